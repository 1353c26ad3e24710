"""Recorded results: scaling, the report's tables, plots. The files in benchmarks/results have to stay readable."""

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest

from moe_ops.cli import plots
from moe_ops.cli.recorded import beside, best_recorded, load_peers, scale
from tests.amount import in_full

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = RESULTS / "2026-11-22-h200-peers-bf16.json"
WHOLE = RESULTS / "2026-11-28-h200-whole-op-bf16.json"
EAGER = RESULTS / "2026-11-28-h200-eager-bf16.json"


@pytest.fixture(scope="module")
def report():
    """benchmarks/report.py, whose neighbours it finds as the script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("report")


@pytest.fixture(scope="module")
def tables(report):
    return importlib.import_module("result_tables")


def rows(lines) -> list[list[str]]:
    """The cells of a Markdown table's rows, header first."""
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    return [table[0], *table[2:]]


# Scaling.


def test_scale_follows_what_binds_the_cell():
    peers = {"stream_gbs": 4000.0, "cublas_tflops": {"short": 800.0, "sustained": 700.0}}
    assert scale({"bound": "bytes", "stream_gbs": 5000.0, "cublas_tflops": 1.0}, peers) == pytest.approx(0.8)
    assert scale({"bound": "flops", "stream_gbs": 1.0, "cublas_tflops": 790.0}, peers) == pytest.approx(800 / 790)
    assert scale({"bound": "flops", "stream_gbs": 1.0, "cublas_tflops": 710.0}, peers) == pytest.approx(700 / 710)


def test_best_recorded():
    best = best_recorded(load_peers(PEERS))
    assert len(best) == 35
    assert best["qwen3-30b-a3b", 4096] == (pytest.approx(0.736, abs=5e-4), "SGLang 0.5.23, TMA forced")


def test_recorded_peers_met_uniform_routing():
    peers = load_peers(PEERS)
    cell = next(cell for cell in json.loads(WHOLE.read_text())["cells"] if cell["shape"] == "gpt-oss-20b")
    assert beside(cell, peers)["scaled_ms"] == pytest.approx(beside(cell, peers)["ms"] * scale(cell, peers))
    assert beside(cell | {"routing": "zipf"}, peers) is None
    assert beside(cell | {"shape": "E4-k2-H32-I16", "sizes": [4, 2, 32, 16]}, peers) is None
    # By another name the same sizes are still the same experts.
    assert beside(cell | {"shape": "another-name"}, peers) == beside(cell, peers)


# Tables.


def test_peers_table_of_the_recorded_files(report, capsys):
    report.main([str(WHOLE), str(PEERS)])
    out = capsys.readouterr().out
    assert re.match(r"NVIDIA H200, torch \S+, triton \S+, \d{4}-\d\d-\d\d, bfloat16\.\n\n", out)
    table = rows(out.splitlines())
    assert table[0] == [
        "shape", "M", "tma ms", "classic ms", "grouped_mm ms", "read ms", "of limit",
        "best recorded peer", "factor", "scaled",
    ]  # fmt: skip
    assert len(table) == 36
    first = json.loads(WHOLE.read_text())["cells"][0]
    assert table[1][:3] == ["mixtral-8x7b", "1", f"{first['ms']['tma']:.4f}"]
    assert table[1][-3] == "0.196 vLLM 0.22.1"
    assert abs(float(table[1][-2]) - 0.196 / first["ms"]["tma"]) < 5e-3  # a rounded time
    for kind in ("plain", "scaled"):
        factors = [float(row[-2 if kind == "plain" else -1]) for row in table[1:]]
        mean, ahead = statistics.geometric_mean(factors), sum(factor > 1 for factor in factors)
        shown = re.search(rf"Geometric mean of the {kind} factors: (\S+); ahead in (\d+) of 35 cells\.", out)
        assert abs(float(shown[1]) - mean) < 2e-3 and abs(int(shown[2]) - ahead) <= 1  # rounded factors


def test_peers_table_of_cells_nobody_recorded(tables):
    ours = json.loads(WHOLE.read_text())
    first, second = ours["cells"][:2]
    ours["cells"] = [first | {"tokens": 7}, second | {"routing": "zipf"}]
    lines = list(tables.peers_table(ours, load_peers(PEERS)))
    assert [row[7:] for row in rows(lines)[1:]] == [["-", "-", "-"]]
    assert not any("Geometric" in line for line in lines)


def test_eager_times_are_not_held_against_graphs(report):
    with pytest.raises(SystemExit, match="'eager'"):
        report.main([str(EAGER), str(PEERS)])


def test_peers_table_of_a_format(report, capsys, tmp_path):
    ours = json.loads(WHOLE.read_text())
    peers = RESULTS / "2026-11-22-h200-peers-fp8-block.json"
    file = tmp_path / "ours.json"
    file.write_text(json.dumps(ours | {"format": "fp8_block"}))
    report.main([str(file), str(peers)])
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(", bfloat16, fp8_block.")
    table = rows(out.splitlines())
    assert len(table) == 36 and table[1][-3] == "0.124 DeepGEMM 2.5.0, permute and combine by hand"
    assert [row[-3:] for row in table if row[0] == "gpt-oss-20b"] == [["-", "-", "-"]] * 7
    assert out.count("Geometric mean of the") == 2 and out.count("of 28 cells") == 2
    with pytest.raises(SystemExit, match="format fp8_block, not none"):
        report.main([str(WHOLE), str(peers)])
    with pytest.raises(SystemExit, match="format none, not fp8_block"):
        report.main(["plot", str(file), str(tmp_path), str(PEERS)])


@pytest.mark.parametrize("arguments", [[], ["skew"], [str(WHOLE)], ["a", "b", "c"]])
def test_report_explains_itself(report, arguments):
    with pytest.raises(SystemExit, match=r"report\.py skew OURS"):
        report.main(arguments)


def cell(routing: str, time: float, limit: float, padded_limit: float, padded_rows: int, **facts) -> dict:
    path = {"variant": "pingpong", "padded_limit_ms": padded_limit, "padded_rows": padded_rows, **facts}
    return {
        "shape": "toy", "sizes": [8, 2, 64, 32], "routing": routing, "tokens": 100, "experts_met": 8,
        "ms": {"tma": time, "classic": 9.0, "vllm": None}, "limit_ms": limit, "paths": {"tma": path, "classic": path},
    }  # fmt: skip


HEAD = {"device": "Fake GPU", "torch": "2", "triton": "3", "date": "today", "dtype": "float16", "mode": "graph"}


def test_skew_table(report, capsys, tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.json")]
    files[0].write_text(json.dumps(HEAD | {"cells": [cell("uniform", 1.0, 0.8, 1.0, 300)]}))
    files[1].write_text(json.dumps(HEAD | {"cells": [cell("zipf", 1.5, 0.5, 1.0, 400)]}))
    report.main(["skew", *map(str, files)])
    table = rows(capsys.readouterr().out.splitlines())
    assert table[0][-3:] == ["time / limit", "padding explains", "time / padded limit"]
    assert table[1] == [
        "toy", "100", "uniform", "8", "tma pingpong", "1.0000", "1.00", "1.50", "1.25", "1.25", "1.00",
    ]  # fmt: skip
    assert table[2] == ["toy", "100", "zipf", "8", "tma pingpong", "1.5000", "1.50", "2.00", "3.00", "2.00", "1.50"]


def test_skew_table_without_uniform(tables):
    table = rows(tables.skew_table([HEAD | {"cells": [cell("one", 1.0, 0.8, 1.0, 300)]}]))
    assert table[1][6] == "-"


def test_stages_table(tables):
    gemm = {"us": 10.0, "tflops": 640.0, "of_cublas": 0.8, "of_limit": 0.9, "bound": "flops"}
    stages = {"up": gemm, "down": gemm, "op_over_stages": 1.06}
    sorted_stages = stages | {"route": {"us": 3.0}, "combine": {"us": 4.0, "gbs": 3800.0, "of_stream": 0.95}}
    cells = [
        cell("uniform", 1.0, 0.8, 1.0, 300, stages=sorted_stages),
        cell("uniform", 1.0, 0.8, 1.0, 300, stages=stages),
        cell("uniform", 1.0, 0.8, 1.0, 300),
    ]
    table = rows(tables.stages_table(HEAD | {"cells": cells}))
    assert len(table) == 1 + 2 * 2
    assert table[1][3:] == [
        "tma pingpong", "3.0", "10.0", "640", "0.80", "0.90", "10.0", "640", "0.80", "0.90", "4.0", "0.95", "1.06",
    ]  # fmt: skip
    assert table[3][4] == table[3][-2] == "-"
    assert len(rows(tables.stages_table(json.loads(EAGER.read_text())))) == 1


def test_stages_table_of_a_format(tables):
    gemm = {"us": 10.0, "tflops": 640.0, "of_cublas": 0.8, "of_limit": 0.9, "bound": "flops"}
    scaled = gemm | {"of_scaled_mm": 0.4}
    stages = {"up": scaled, "down": scaled, "op_over_stages": 1.06}
    quantized = {"quantize": {"us": 2.0, "gbs": 2000.0, "of_stream": 0.5}, "route": {"us": 3.0}, **stages}
    cells = [cell("uniform", 1.0, 0.8, 1.0, 300, stages=which) for which in (quantized, stages)]
    for one in cells:
        one["scaled_mm_tflops"] = 1600.0
    table = rows(tables.stages_table(HEAD | {"format": "fp8_block", "cells": cells}))
    assert table[0][4:7] == ["quantize us", "quantize of stream", "route us"] and "up of scaled mm" in table[0]
    assert table[1][4:] == [
        "2.0", "0.50", "3.0", "10.0", "640", "0.80", "0.90", "0.40", "10.0", "640", "0.80", "0.90", "0.40", "-", "-",
        "1.06",
    ]  # fmt: skip
    assert table[3][4:7] == ["-", "-", "-"]
    cells = [cell("uniform", 1.0, 0.8, 1.0, 300, stages={"up": gemm, "down": gemm}) | {"scaled_mm_tflops": None}]
    assert "quantize us" not in rows(tables.stages_table(HEAD | {"format": "int4", "cells": cells}))[0]


def test_tables_that_benchmarks_write_as_rows(tables):
    record = HEAD | {"columns": ["shape", "M", "up alone us", "topk_route us", "ratio", "aim"]}
    lines = tables.rows_table(record | {"rows": [["toy", 64, 12.34, 3.456, 2.04, 5.0]]})
    assert rows(lines)[1] == ["toy", "64", "12", "3.46", "2.0", "5"]


def test_weights_side_by_side(tables):
    whole = HEAD | {"cells": [cell("uniform", 1.0, 0.5, 1.0, 300)]}
    other = cell("uniform", 0.25, 0.125, 1.0, 300) | {"tokens": 7, "read_ms": 0.2, "bound": "bytes"}
    many = cell("uniform", 0.5, 0.25, 1.0, 300) | {"read_ms": 0.2, "bound": "flops"}
    int8 = HEAD | {"format": "int8_weights", "cells": [many, other]}
    int4 = HEAD | {"format": "int4", "cells": int8["cells"][:1]}
    table = rows(tables.weights_table(whole, int8, int4))
    parts = ["of limit", "of read"]
    assert table[0] == ["shape", "M", "bf16 ms", "int8 ms", *parts, "int4 ms", *parts]
    assert table[1] == ["toy", "100", "1.0000", "0.5000", "0.50", "-", "0.5000", "0.50", "-"]
    assert table[2] == ["toy", "7", "-", "0.2500", "0.50", "0.80", "-", "-", "-"]


def test_behind_is_said(tables):
    peers = load_peers(PEERS)
    ours = json.loads(WHOLE.read_text())
    for cell in ours["cells"]:
        cell["ms"]["tma"] *= 0.9
    assert not any("Behind" in line for line in tables.peers_table(ours, peers))
    last = ours["cells"][-1]
    assert (last["shape"], last["tokens"]) == ("gpt-oss-20b", 16384)
    last["ms"]["tma"] *= 1.6
    behind = next(line for line in tables.peers_table(ours, peers) if "Behind" in line)
    assert re.fullmatch(r"Behind, scaled: gpt-oss-20b at 16384 \(0\.7\d\d\)\.", " ".join(behind.split()))


def test_tables_of_a_whole_model(report):
    def record(date: str, *cells: dict) -> dict:
        facts = {"transformers": "5", "layers": 4, "vocabulary": 99, "context": 256}
        return HEAD | facts | {"date": date, "cells": list(cells)}

    eager = {"workload": "decode", "tokens": 16, "compiled": False, "blocks": {}, "left_out": {"batched_mm": "too big"}}
    eager["step"] = {"eager": 4.0, "grouped_mm": 2.0, "moe_ops": 1.0, "moe_ops + routers": 0.5}
    compiled = eager | {"compiled": True, "left_out": {"eager": "no graph"}}
    compiled["blocks"] = {"grouped_mm": 1.0, "moe_ops": 0.5, "moe_ops + routers": 0.25}
    model_table = importlib.import_module("model_tables").model_table
    lines = list(model_table(record("one day", eager, compiled | {"step": {}}), record("another", compiled)))
    assert "one day, float16; 4 of 48 layers, 99 words, 256 tokens in the cache." in " ".join(lines[0].split())
    speeds, shares = [[line for line in lines if line.startswith(f"| {word}")] for word in ("workload", "decode")]
    assert len(speeds) == 2 and shares == [
        "| decode, batch 16 | as it is | 4000 | 8000 | - | 16000 | 32000 | 2.00 | 4.00 |",
        "| decode, batch 16 | compiled, CUDA graph | 4000 | 8000 | - | 16000 | 32000 | 2.00 | 4.00 |",
        "| decode, batch 16 | 2.000 grouped_mm | 1.000 | 1.000 | 0.500 | 0.500 | 0.250 | 0.500 | 2.00x | 4.00x | 4.00x |",  # noqa: E501
    ]
    assert lines[-2:] == ["\nA dash for batched_mm: too big.", "\nA dash for eager: no graph."]
    assert not any("Where the time" in line for line in model_table(record("one day", eager)))


# The docs.


def test_the_docs_are_what_the_results_give(report, capsys):
    """What this finds, `python benchmarks/report.py docs` mends."""
    report.main(["docs", "--check"])
    assert capsys.readouterr().out.strip() == ""


@pytest.fixture
def pages(report, monkeypatch, tmp_path):
    """A page of two parts, and the results of two runs."""
    pages = importlib.import_module("result_pages")
    names = {"ROOT": tmp_path, "RESULTS": tmp_path / "results", "IMAGES": tmp_path, "PAGES": ("page.md",)}
    for name, value in names.items():
        monkeypatch.setattr(pages, name, value)
    (tmp_path / "results").mkdir()
    for prefix, device in (("2026-01-01-h100", "Old GPU"), ("2026-02-02-h200", "New GPU")):
        record = HEAD | {"device": device, "columns": ["a"], "rows": [["b"]]}
        (tmp_path / "results" / f"{prefix}-step.json").write_text(json.dumps(record))
    part = "<!-- {}: rows 2026-01-01-h100-{}.json -->\nas it was\n<!-- end -->\n"
    text = "".join(part.format(*words) for words in (("current", "step"), ("recorded", "step"), ("current", "gone")))
    (tmp_path / "page.md").write_text(f"above\n{text}below\n")
    return pages


def test_pages_are_made_anew(pages):
    assert len(pages.outdated()) == 2
    assert pages.rewrite() == [Path("page.md")] and pages.outdated() == [] and pages.rewrite() == []
    text = (pages.ROOT / "page.md").read_text()
    assert text.count("Old GPU") == 2 and text.count("as it was") == 1
    assert text.startswith("above\n<!-- current: rows") and text.endswith("<!-- end -->\nbelow\n")


def test_pages_go_on_to_a_newer_run(pages):
    pages.rewrite("2026-02-02-h200")
    first, second, third, _ = (pages.ROOT / "page.md").read_text().split("<!-- end -->")
    assert "2026-02-02-h200-step.json" in first and "New GPU" in first
    assert "2026-01-01-h100-step.json" in second and "Old GPU" in second
    assert "2026-01-01-h100-gone.json" in third and "as it was" in third
    with pytest.raises(SystemExit, match=r"no results 2027-01-01-h100-\*"):
        pages.rewrite("2027-01-01-h100")


# Plots.


def test_the_picture_has_every_peer(report, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    report.main(["picture", str(WHOLE), str(PEERS), str(tmp_path / "all.png")])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    styles = dict(importlib.import_module("result_picture")._styles(load_peers(PEERS)))
    assert set(styles) == {name for one in load_peers(PEERS)["cells"] for name in one["ms"]}
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == len(styles)


@pytest.mark.parametrize(
    ("file", "peers"),
    [(WHOLE, [str(PEERS)]), pytest.param(WHOLE, [], marks=in_full), (EAGER, [])],
    ids=lambda value: "",
)
def test_plots_of_the_recorded_files(report, capsys, tmp_path, file, peers):
    pytest.importorskip("matplotlib")
    report.main(["plot", str(file), str(tmp_path), *peers])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and capsys.readouterr().out.count(".png") == 5
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_plot_says_what_is_recorded():
    pytest.importorskip("matplotlib")
    peers, record = load_peers(PEERS), json.loads(WHOLE.read_text())
    cells = record["cells"][:7]
    for one in cells:
        one["recorded"] = beside(one, peers)
    cells[3]["ms"]["grouped_mm"] = None
    figure = plots._figure(record, "mixtral-8x7b", cells)
    latency, fraction = figure.axes
    lines = {line.get_label(): line for line in latency.get_lines()}
    recorded = [label for label in lines if "recorded" in label]
    assert len(recorded) == 2 and all(lines[label].get_linestyle() == "--" for label in recorded)
    assert len(lines["tma"].get_xdata()) == 7 and len(lines["grouped_mm"].get_xdata()) == 6
    assert (latency.get_xscale(), latency.get_yscale()) == ("log", "log")
    reached = next(line for line in fraction.get_lines() if line.get_label() == "tma").get_ydata()
    assert reached[0] == pytest.approx(cells[0]["limit_ms"] / cells[0]["ms"]["tma"])
    assert "bfloat16, fp8_block," in plots._figure(record | {"format": "fp8_block"}, "", cells).get_suptitle()
    for words in ("mixtral-8x7b", "NVIDIA H200", "torch 2.11.0", "triton 3.6.0", "2026-11-28"):
        assert words in figure.get_suptitle()
