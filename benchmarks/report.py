"""Turns recorded results into the tables and pictures of the docs.

    python benchmarks/report.py OURS PEERS            the whole op beside the best recorded peer
    python benchmarks/report.py stages OURS           each stage alone
    python benchmarks/report.py skew OURS [OURS ...]  each routing beside the uniform one
    python benchmarks/report.py tiles OURS [PEERS]    heuristic's tiles, tuned ones and best recorded peer
    python benchmarks/report.py plot OURS DIR [PEERS] the plots of `bench --plot`
    python benchmarks/report.py picture OURS PEERS FILE  latency over M beside every recorded peer
    python benchmarks/report.py docs [PREFIX]         every table and picture of the docs, again
    python benchmarks/report.py docs --check          says which tables of the docs are not those of their results

It needs moe_ops installed, or PYTHONPATH=. in front. OURS are what `python -m moe_ops bench --json` wrote. PEERS are
recorded results of another run, whose clocks were not ours: besides the plain factor there is one in which their time
is scaled to this run's ceilings, by the read-only stream where a cell is bound by bytes and by the cuBLAS product where
it is bound by FLOPs. With a PREFIX, that of files of benchmarks/release.sh, the docs' current tables become those of
its run; those of runs that are told to be old stay.
"""

import json
import sys
from pathlib import Path

import result_pages
from result_picture import draw
from result_tables import peers_table, skew_table, stages_table
from tile_tables import tiles_table

from moe_ops.cli import plots
from moe_ops.cli.recorded import beside, check_recorded, load_peers


def main(arguments: list[str]) -> None:
    """Prints what was asked for."""
    match arguments:
        case ["stages", ours]:
            lines = stages_table(_load(ours))
        case ["skew", *files] if files:
            lines = skew_table([_load(file) for file in files])
        case ["tiles", ours, *peers] if len(peers) < 2:
            lines = tiles_table(*_pair(_load(ours), *peers)) if peers else tiles_table(_load(ours))
        case ["plot", ours, folder, *peers] if len(peers) < 2:
            record, recorded = _pair(_load(ours), *peers) if peers else (_load(ours), None)
            for cell in record["cells"] if recorded else ():
                cell["recorded"] = beside(cell, recorded)
            lines = map(str, plots.plot(record, folder))
        case ["picture", ours, peers, file]:
            draw(*_pair(_graphs(_load(ours)), peers), file)
            lines = [file]
        case ["docs", "--check"]:
            lines = result_pages.outdated()
            if lines:
                sys.exit("\n".join(lines))
        case ["docs", *prefix] if len(prefix) < 2:
            lines = map(str, result_pages.rewrite(*prefix))
        case [ours, peers]:
            lines = peers_table(*_pair(_graphs(_load(ours)), peers))
        case _:
            sys.exit(__doc__)
    print(*lines, sep="\n")


def _load(file: str) -> dict:
    return json.loads(Path(file).read_text())


def _graphs(record: dict) -> dict:
    if record["mode"] != "graph":
        sys.exit(f"the record's mode is {record['mode']!r}, and the peers were recorded in CUDA graphs")
    return record


def _pair(record: dict, file: str) -> tuple[dict, dict]:
    """A record, and the recorded peers of a file if they can stand beside it."""
    peers = load_peers(file)
    try:
        check_recorded(peers, file, record["dtype"], record.get("format", "none"))
    except ValueError as error:
        sys.exit(str(error))
    return record, peers


if __name__ == "__main__":
    main(sys.argv[1:])
