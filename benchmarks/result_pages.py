"""The parts of the docs that are made from results, between two comments:

    <!-- current: peers 2026-11-28-h200-whole-op-bf16.json 2026-11-22-h200-peers-bf16.json -->
    ...
    <!-- end -->

The first says how the part is made and from which files of benchmarks/results; `recorded` in the place of `current` is
a part that stays that of its run when the docs go on to a newer one. A part of which a file is not there (measured
before its benchmark wrote one) is left as it is. Sentences about numbers stand outside, and say of which run they
speak.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import rank_tables
import result_tables as tables
from model_tables import model_table
from result_picture import caption, draw
from tile_tables import tiles_table

from moe_ops.cli import plots
from moe_ops.cli.recorded import beside

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("benchmarks", "benchmarks-h100", "distributed", "router", "tuning")),
)
IMAGES = ROOT / "docs" / "images"

_PART = re.compile(r"^<!-- (current|recorded): (\w+) ([^>]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"\d{4}-\d\d-\d\d-[a-z0-9]+-(.+)")

# How a part is made of its records: lines of Markdown.
KINDS: dict[str, Callable[..., Iterable[str]]] = {
    "peers": tables.peers_table,
    "stages": lambda ours: tables.stages_table(ours, "tma"),
    "skew": lambda ours: tables.skew_table([ours]),
    "tiles": tiles_table,
    "gains": lambda ours: ["![What tuned tiles gain over the heuristic's](images/bench-tiles.png)"],
    "eager": tables.eager_table,
    "weights": tables.weights_table,
    "rows": tables.rows_table,
    "cpu": tables.cpu_table,
    "model": model_table,
    "proof": tables.proof_lines,
    "demo": tables.demo_lines,
    "network": rank_tables.network_table,
    "ranks": rank_tables.ranks_table,
    "host": rank_tables.host_table,
    "plots": lambda ours, peers: [f"![{shape}](images/bench-{shape}-uniform.png)" for shape in _shapes(ours)],
    "picture": caption,
}
# What else a part has: files of pictures.
PICTURES = {
    "gains": lambda ours: plots.plot_tiles(ours, IMAGES / "bench-tiles.png"),
    "picture": lambda ours, peers: draw(ours, peers, IMAGES / "latency-bf16.png"),
    "plots": lambda ours, peers: plots.plot(_with_peers(ours, peers), IMAGES),
}


def _shapes(record: dict) -> list[str]:
    return list(dict.fromkeys(cell["shape"] for cell in record["cells"]))


def _with_peers(ours: dict, peers: dict) -> dict:
    return {**ours, "cells": [{**cell, "recorded": beside(cell, peers)} for cell in ours["cells"]]}


def load(names: list[str]) -> list[dict] | None:
    """The records of a part, each with the name of its file; None where one is not there."""
    files = [RESULTS / name for name in names]
    if not all(file.exists() for file in files):
        return None
    return [{"file": file.name, **json.loads(file.read_text())} for file in files]


def part(match: re.Match, prefix: str | None) -> tuple[str, list[dict] | None]:
    """(a part anew, its records): of the run with this prefix, if the part is current and that run has its files."""
    age, kind, words, old = match.groups()
    names = words.split()
    if age == "current" and prefix:
        newer = [re.sub(_RUN, rf"{prefix}-\1", name) if "-peers-" not in name else name for name in names]
        # A picture without scaling wants peers of its own card.
        if (found := load(newer)) and (kind != "picture" or found[0]["device"] == found[1]["device"]):
            names = newer
    records = load(names)
    body = old if records is None else "\n".join(KINDS[kind](*records)) + "\n"
    return f"<!-- {age}: {kind} {' '.join(names)} -->\n{body}<!-- end -->", records


def rewrite(prefix: str | None = None) -> list[Path]:
    """Writes the pages and pictures anew; returns those that changed, and all pictures."""
    if prefix and not list(RESULTS.glob(f"{prefix}-*.json")):
        raise SystemExit(f"there are no results {prefix}-*.json in {RESULTS.relative_to(ROOT)}")
    written = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = _PART.sub(lambda match: part(match, prefix)[0], text)
        if new != text:
            (ROOT / page).write_text(new)
            written.append(ROOT / page)
        for match in _PART.finditer(new):
            records = load(match[3].split())
            if match[2] in PICTURES and records and plots.available():
                made = PICTURES[match[2]](*records)
                written += made if isinstance(made, list) else [made]
    return [file.relative_to(ROOT) for file in written]


def outdated() -> list[str]:
    """Parts that are not what their results give."""
    return [
        f"{page}: {match[2]} of {match[3]}"
        for page in PAGES
        for match in _PART.finditer((ROOT / page).read_text())
        if part(match, None)[0] != match[0]
    ]
