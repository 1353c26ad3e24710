"""What commands print and write: tables with and without rich, CSV, Markdown, comparisons."""

import csv
import json
import sys

import pytest

from moe_ops.cli import export, output

pytestmark = pytest.mark.usefixtures("without_a_gpu")


def test_tables_on_a_terminal_and_without_rich(capsys, monkeypatch):
    rows = [(1, "[red]x[/red]", None), (22, "y", 2.5)]
    output.show_table("title", ("a", "b", "c"), rows)
    plain = capsys.readouterr().out
    assert plain == "title\na   b             c\n1   [red]x[/red]  -\n22  y             2.5\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich.table", None)
        output.show_table("title", ("a", "b", "c"), rows)
    assert capsys.readouterr().out == plain
    pytest.importorskip("rich")
    output.show_table("title", ("a", "b", "c"), rows)
    rich = capsys.readouterr().out
    assert rich != plain and "[red]x[/red]" in rich and "2.5" in rich


RECORD = {
    "device": "H200", "dtype": "bfloat16", "format": "int4", "torch": "2.11", "triton": "3.6", "date": "2026-11-26",
    "cells": [
        {
            "shape": "s", "routing": "uniform", "tokens": tokens, "ms": {"tma": 2.0, "classic": None},
            "spread_ms": {"tma": [1.5, 3.0]}, "limit_ms": 1.0, "bound": "bytes",
        }
        for tokens in (1, 64)
    ],
}  # fmt: skip


def test_csv(tmp_path):
    export.write_csv(RECORD, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and rows[0] == {
        "device": "H200", "dtype": "bfloat16", "format": "int4", "shape": "s", "routing": "uniform", "tokens": "1",
        "variant": "tma", "ms": "2.0", "lowest_ms": "1.5", "highest_ms": "3.0", "limit_ms": "1.0", "bound": "bytes",
    }  # fmt: skip
    assert rows[1]["ms"] == ""


def test_markdown(tmp_path):
    export.write_markdown(RECORD, tmp_path / "out.md")
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert lines[0] == "H200, torch 2.11, triton 3.6, 2026-11-26, bfloat16, int4."
    assert lines[2:] == [
        "| shape | routing | M | tma ms | classic ms | limit ms | bound |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| s | uniform | 1 | 2.0000 | - | 1.0000 | bytes |",
        "| s | uniform | 64 | 2.0000 | - | 1.0000 | bytes |",
    ]


def test_compare(tmp_path):
    before = {**RECORD, "cells": [{**cell, "ms": {"tma": 4.0 / cell["tokens"]}} for cell in RECORD["cells"]]}
    (tmp_path / "before.json").write_text(json.dumps(before))
    text = export.compare(export.load_record(tmp_path / "before.json"), RECORD)
    assert text.splitlines()[0] == "compared with H200, bfloat16, 2026-11-26"
    assert text.splitlines()[2].split() == ["s", "uniform", "1", "tma", "4.0000", "2.0000", "0.500"]
    assert text.endswith("geometric mean of now / before: tma 4.000")
    assert "across devices" in export.compare({**before, "device": "H100"}, RECORD)
    assert "none of these cells" in export.compare({**before, "cells": []}, RECORD)
    (tmp_path / "other.json").write_text('{"device": "H200"}')
    with pytest.raises(ValueError, match="lacks dtype, cells"):
        export.load_record(tmp_path / "other.json")
