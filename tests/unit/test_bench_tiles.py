"""`bench --variant heuristic --variant tuned`: what the two come to, in lines and in Markdown."""

import pytest

from moe_ops.cli.export import write_markdown
from moe_ops.cli.table import tiles

HEAD = {"device": "NVIDIA H100", "torch": "2.11", "triton": "3.6", "date": "2026-11-26", "dtype": "bfloat16"}


def cell(heuristic: float | None, tuned: float | None, source: str = "heuristic", **more) -> dict:
    return {
        "shape": "olmoe-1b-7b", "routing": "uniform", "tokens": 16, "limit_ms": 0.5, "bound": "bytes",
        "ms": {"heuristic": heuristic, "tuned": tuned}, "spread_ms": {},
        "paths": {"tuned": {"tiles": source, "padded_limit_ms": 0.5}}, **more,
    }  # fmt: skip


def test_how_near_the_heuristic_is():
    cells = [cell(1.0, 1.0), cell(1.1, 1.0, "table"), cell(1.11, 1.0, "table"), cell(1.0, 1.05), cell(None, 1.0)]
    near, worse = tiles(cells)
    assert "at most 10% longer than tuned ones in 3 of 4 cells (75.0%), at the worst 11.0%" in near
    assert "a table has other tiles in 2" in near
    assert "over 2% longer than the heuristic's in 1 of 4 cells, at the worst 5.0%" in worse


def test_without_both_there_is_nothing_to_say():
    assert tiles([{"ms": {"tma": 1.0}, "paths": {}}]) == [] == tiles([])


def test_equal_times_are_no_loss():
    near, worse = tiles([cell(1.0, 1.0)])
    assert "in 1 of 1 cells (100.0%), at the worst 0.0%" in near and "in 0 of 1 cells, at the worst 0.0%" in worse


@pytest.mark.parametrize("recorded", [None, {"name": "vLLM 0.22.1", "ms": 1.5, "scaled_ms": 2.0}])
def test_markdown_has_all_three(tmp_path, recorded):
    file = tmp_path / "tiles.md"
    write_markdown({**HEAD, "cells": [cell(1.1, 1.0, "table", recorded=recorded)]}, file)
    text = file.read_text()
    head, row = [line for line in text.splitlines() if line.startswith("| ")][0::2]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["heuristic ms"] == "1.1000" and cells["tuned ms"] == "1.0000" and cells["heuristic / tuned"] == "1.100"
    assert ("vLLM 0.22.1" in text) == (recorded is not None)
    if recorded is not None:
        assert cells["its ms, scaled"] == "2.0000" and cells["scaled / ours |"] == "2.000 |"
    assert text.startswith("NVIDIA H100, torch 2.11, triton 3.6, 2026-11-26, bfloat16.\n")
    assert "\nThe heuristic's tiles take at most 10% longer" in text
