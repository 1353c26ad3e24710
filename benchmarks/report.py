"""Turns recorded results into the tables of docs/benchmarks.md.

    python benchmarks/report.py OURS PEERS            the whole op beside the best recorded peer
    python benchmarks/report.py stages OURS           each stage alone
    python benchmarks/report.py skew OURS [OURS ...]  each routing beside the uniform one
    python benchmarks/report.py tiles OURS            heuristic, tuned and best recorded peer, of a run with all three
    python benchmarks/report.py plot OURS DIR [PEERS] the plots of `bench --plot`

It needs moe_ops installed, or PYTHONPATH=. in front. OURS are what `python -m moe_ops bench --json` wrote. PEERS are
recorded results of another run, whose clocks were not ours: besides the plain factor there is one in which their time
is scaled to this run's ceilings, by the read-only stream where a cell is bound by bytes and by the cuBLAS product where
it is bound by FLOPs.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_ops.cli import plots
from moe_ops.cli.export import markdown
from moe_ops.cli.recorded import beside, check_recorded, load_peers
from moe_ops.cli.table import fastest_path

Row = Iterable[object]


def peers_table(ours: dict, peers: dict) -> Iterator[str]:
    """The whole op by every variant, and the factors to the best recorded peer."""
    cells = [cell for cell in ours["cells"] if cell.get("routing", "uniform") == "uniform" and cell["ms"].get("tma")]
    variants = list(dict.fromkeys(name for cell in cells for name in cell["ms"]))
    rows, factors, scaled_factors = [], [], []
    for cell in cells:
        time = cell["ms"]["tma"]
        row = [cell["shape"], cell["tokens"], *(number(cell["ms"].get(name), ".4f") for name in variants)]
        row += [number(cell.get("read_ms"), ".4f"), f"{cell['limit_ms'] / time:.2f}"]
        if best := beside(cell, peers):
            factors.append(best["ms"] / time)
            scaled_factors.append(best["scaled_ms"] / time)
            row += [f"{best['ms']:.3f} {best['name']}", f"{factors[-1]:.3f}", f"{scaled_factors[-1]:.3f}"]
        else:
            row += ["-"] * 3
        rows.append(row)
    times = [f"{name} ms" for name in variants]
    yield from head(ours)
    yield from table(["shape", "M", *times, "read ms", "of limit", "best recorded peer", "factor", "scaled"], rows)
    for name, values in (("plain", factors), ("scaled", scaled_factors)):
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            ahead = sum(value > 1 for value in values)
            yield f"\nGeometric mean of the {name} factors: {mean:.3f}; ahead in {ahead} of {len(values)} cells."


def stages_table(ours: dict) -> Iterator[str]:
    """Each stage alone, and the whole op over up + down + combine at the stream's rate."""
    gemm = {"us": ".1f", "tflops": ".0f", "of_cublas": ".2f", "of_limit": ".2f"}
    shown = {"route": {"us": ".1f"}, "up": gemm, "down": gemm, "combine": {"us": ".1f", "of_stream": ".2f"}}
    if any(cell.get("scaled_mm_tflops") for cell in ours["cells"]):  # in fp8 or int8
        gemm["of_scaled_mm"] = ".2f"
        shown = {"quantize": {"us": ".1f", "of_stream": ".2f"}, **shown}
    rows = []
    for cell in ours["cells"]:
        for path, facts in cell.get("paths", {}).items():
            if stages := facts.get("stages"):
                row = [cell["shape"], cell["routing"], cell["tokens"], f"{path} {facts['variant']}"]
                for stage, forms in shown.items():
                    row += [number(stages.get(stage, {}).get(key), form) for key, form in forms.items()]
                rows.append([*row, number(stages.get("op_over_stages"), ".2f")])
    columns = [f"{stage} {key.replace('_', ' ')}" for stage, forms in shown.items() for key in forms]
    yield from head(ours)
    yield from table(["shape", "routing", "M", "path", *columns, "op over stages"], rows)


def skew_table(records: list[dict]) -> Iterator[str]:
    """Each routing beside the uniform one: time over limit, and how much of it the padding rows explain."""
    cells = [cell for record in records for cell in record["cells"] if fastest_path(cell)]
    uniform = {_key(cell): cell["ms"][fastest_path(cell)] for cell in cells if cell["routing"] == "uniform"}
    rows = []
    for cell in sorted(cells, key=_key):  # stable: the routings of a cell stay in their order
        path = fastest_path(cell)
        facts, time, limit = cell["paths"][path], cell["ms"][path], cell["limit_ms"]
        routes = cell["tokens"] * cell["sizes"][1]
        over_uniform = time / uniform[_key(cell)] if _key(cell) in uniform else None
        row = [cell["shape"], cell["tokens"], cell["routing"], cell["experts_met"], f"{path} {facts['variant']}"]
        row += [f"{time:.4f}", number(over_uniform, ".2f"), f"{facts['padded_rows'] / routes:.2f}"]
        row += [f"{time / limit:.2f}", f"{facts['padded_limit_ms'] / limit:.2f}"]
        rows.append([*row, f"{time / facts['padded_limit_ms']:.2f}"])
    columns = ["shape", "M", "routing", "experts met", "path", "ms", "over uniform", "padded rows / rows"]
    for record in records:
        yield from head(record)
    yield from table([*columns, "time / limit", "padding explains", "time / padded limit"], rows)


def _key(cell: dict) -> tuple[str, int]:
    return cell["shape"], cell["tokens"]


def head(record: dict) -> list[str]:
    """Where and with what a record was made."""
    facts = f"{record['device']}, torch {record['torch']}, triton {record['triton']}"
    return [f"{facts}, {record['date']}, {plots.describe_dtype(record)}.", ""]


def table(columns: list[str], rows: Iterable[Row]) -> Iterator[str]:
    """A Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def number(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def main(arguments: list[str]) -> None:
    """Prints what was asked for."""
    match arguments:
        case ["stages", ours]:
            lines = stages_table(_load(ours))
        case ["skew", *files] if files:
            lines = skew_table([_load(file) for file in files])
        case ["tiles", ours]:
            record = _load(ours)
            lines = [markdown(record, [cell for cell in record["cells"] if cell.get("recorded")])]
        case ["plot", ours, folder, *peers] if len(peers) < 2:
            record, recorded = _pair(_load(ours), *peers) if peers else (_load(ours), None)
            for cell in record["cells"] if recorded else ():
                cell["recorded"] = beside(cell, recorded)
            lines = map(str, plots.plot(record, folder))
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
