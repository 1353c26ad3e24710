"""`bench --variant heuristic --variant tuned`: what the two come to, in lines and in Markdown."""

import json

import pytest

from moe_ops.cli import plots
from moe_ops.cli.export import write_markdown
from moe_ops.cli.table import tiles
from tests.unit.test_bench_report import PEERS, report  # noqa: F401  (the second is a fixture)

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
    assert "tuned ones are a table's in 2" in near
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


def report_of(report, capsys, file, cells: list[dict], *peers: str) -> str:  # noqa: F811
    file.write_text(json.dumps({**HEAD, "cells": cells}))
    report.main(["tiles", str(file), *peers])
    return capsys.readouterr().out


def test_the_report_has_all_cells_and_what_they_come_to(report, tmp_path, capsys):  # noqa: F811
    made = {"shape": "mixtral-8x7b", "sizes": [8, 2, 4096, 14336]}
    cells = [
        cell(1.12, 1.0, "table"), cell(1.0, 1.03, "table") | {"tokens": 64}, cell(1.0, 1.01) | {"tokens": 256},
        cell(1.0, None) | {"tokens": 1024}, cell(1.0, 0.98) | made,
    ]  # fmt: skip
    text = report_of(report, capsys, tmp_path / "tiles.json", cells)
    assert "| heuristic / tuned at M = | made from it | 16 | 64 | 256 |" in text
    first, second = (line for line in text.splitlines() if line.startswith(("| mixtral", "| olmoe")))
    assert first == "| mixtral-8x7b | yes | 1.020 | - | - |"
    assert second == "| olmoe-1b-7b | no | 1.120* | 0.971* | 0.990 |"
    assert "| all | 4 | 3 (75.0%) | 12.0%, olmoe-1b-7b at 16 | 1.024 | 2 | 1 | 1.030 |" in text
    assert (
        "| that the heuristic was made from | 1 | 1 (100.0%) | 2.0%, mixtral-8x7b at 16 | 1.020 | 0 | 0 | - |" in text
    )
    assert "| others | 3 | 2 (66.7%) |" in text
    assert "(2 calls)" in text and "is 0.980 to 1.010" in " ".join(text.split())
    assert "peer" not in text


def test_the_report_shows_the_calls_that_peers_were_recorded_in(report, tmp_path, capsys):  # noqa: F811
    best = {"name": "vLLM 0.22.1", "ms": 1.5, "scaled_ms": 2.0}
    cells = [cell(1.1, 1.0, "table", recorded=best), cell(1.0, 1.0, recorded=None) | {"tokens": 64}]
    text = report_of(report, capsys, tmp_path / "tiles.json", cells)
    row = "| olmoe-1b-7b | 16 | 1.1000 | 1.0000 | 1.100 | table | 2.0000 vLLM 0.22.1 | 1.818 | 2.000 |"
    assert row in text and text.count("vLLM") == 1
    assert "The peer over tuned, geometric mean: 2.000; ahead in 1 of 1 cells." in text


def test_the_report_looks_up_peers_that_the_run_has_not(report, tmp_path, capsys):  # noqa: F811
    found = cell(0.2, 0.2, stream_gbs=4340.0) | {"shape": "mixtral-8x7b", "sizes": [8, 2, 4096, 14336], "tokens": 1}
    text = report_of(report, capsys, tmp_path / "tiles.json", [found, cell(1.0, 1.0)], str(PEERS))
    assert "| mixtral-8x7b | 1 | 0.2000 | 0.2000 | 1.000 | heuristic | 0.1961 vLLM 0.22.1 | 0.980 | 0.980 |" in text
    assert "ahead in 0 of 1 cells" in text


@pytest.mark.skipif(not plots.available(), reason="matplotlib is not installed")
def test_plot(tmp_path):
    cells = [cell(1.19, 1.0, "table"), cell(1.0, 1.0) | {"tokens": 64}, cell(1.0, None) | {"tokens": 256}]
    files = plots.plot({**HEAD, "cells": cells}, tmp_path)
    assert [file.name for file in files] == ["bench-olmoe-1b-7b-uniform.png", "bench-tiles.png"]
    assert all(file.stat().st_size > 10_000 for file in files)
