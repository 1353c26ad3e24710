"""`python -m moe_ops bench` without a GPU: arguments, routing, and whole runs whose clock is made up."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_ops.cli import bench, harness, main, make_parser, measure, plots
from moe_ops.cli.ahead import Ahead, default_workers
from moe_ops.cli.calls import ROUTINGS, SHAPES, draw_ids, make_calls, parse_shape
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import known_card
from moe_ops.cli.models import COMMON
from moe_ops.cli.peers import PEERS, Peer

SHAPE = "4,2,32,16"


def error_of(capsys, *arguments: str) -> str:
    """The one line that wrong arguments give."""
    try:
        status = main(["bench", *arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and ": error: " in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "nonsense"], "'nonsense' is neither E,TOPK,H,I"),
        (["--shape", "8,2,64"], "'8,2,64' is neither"),
        (["--shape", "8,0,64,64"], "above 0"),
        (["--shape", "2,4,64,64"], "4 different experts of 2"),
        (["--tokens", "1,x"], "'1,x'"),
        (["--tokens", "0"], "'0'"),
        (["--rounds", "0"], "'0'"),
        (["--workers", "-1"], "'-1' is not a number, 0 or above"),
        (["--routing", "skewed"], "'skewed'"),
        (["--variant", "nobody"], "'nobody'"),
        (["--dtype", "float32"], "'float32'"),
        (["--stages", "--eager"], "leave out --eager"),
        (["--stages", "--variant", "grouped_mm"], "add --variant tma"),
        (["--recorded", "/nowhere/peers.json"], "cannot be read"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json"),
        (["--format", "fp9"], "'fp9'"),
        (["--format", "int4", "--peers"], "--peers multiplies unquantised weights"),
        (["--format", "int4", "--variant", "tma", "--variant", "grouped_mm"], "--variant grouped_mm multiplies"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in error_of(capsys, *arguments)


def test_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA device" in error_of(capsys)


def test_plot_needs_matplotlib_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("went on"))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "pip install moe-ops-tma[bench]" in error_of(capsys, "--plot", str(tmp_path / "plots"))
    assert not (tmp_path / "plots").exists()


def test_plot_needs_a_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "available", lambda: True)
    (tmp_path / "file").touch()
    assert "is not a folder" in error_of(capsys, "--plot", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not JSON"), ("[]", "lacks dtype"), ('{"dtype": "float16"}', "lacks cublas_tflops")]
)
def test_recorded_file_is_checked(capsys, tmp_path, text, words):
    (tmp_path / "peers.json").write_text(text)
    assert words in error_of(capsys, "--recorded", str(tmp_path / "peers.json"))


def test_recorded_dtype_is_checked(capsys, tmp_path):
    peers = {"dtype": "bfloat16", "cublas_tflops": {"short": 1.0}, "stream_gbs": 1.0, "cells": []}
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    file = str(tmp_path / "peers.json")
    assert "bfloat16, not float16" in error_of(capsys, "--recorded", file, "--dtype", "float16")
    assert "leave out --eager" in error_of(capsys, "--recorded", file, "--eager")


def test_recorded_format_is_checked(capsys, tmp_path):
    peers = {"dtype": "bfloat16", "cublas_tflops": {"short": 1.0}, "stream_gbs": 1.0, "cells": []}
    for file, formats in (("none.json", {}), ("fp8.json", {"formats": ["fp8_tensor", "fp8_channel"]})):
        (tmp_path / file).write_text(json.dumps(peers | formats))
    none, fp8 = (str(tmp_path / file) for file in ("none.json", "fp8.json"))
    assert "format none, not fp8_block" in error_of(capsys, "--recorded", none, "--format", "fp8_block")
    assert "fp8_tensor or fp8_channel, not fp8_block" in error_of(capsys, "--recorded", fp8, "--format", "fp8_block")
    assert "fp8_tensor or fp8_channel, not none" in error_of(capsys, "--recorded", fp8)


def test_parse_shape():
    assert parse_shape("gpt-oss-20b") == ("gpt-oss-20b", SHAPES["gpt-oss-20b"])
    assert parse_shape("8,2,64,32") == ("E8-k2-H64-I32", (8, 2, 64, 32))


# Routing.


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (100, 32, 1), (257, 128, 8), (5, 4, 4)])
def test_tokens_name_different_experts(routing, tokens, experts, top_k):
    ids = draw_ids(routing, tokens, experts, top_k)
    assert ids.shape == (tokens, top_k) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < experts
    assert all(row.unique().numel() == top_k for row in ids)
    assert torch.equal(ids, draw_ids(routing, tokens, experts, top_k))


def test_uniform_meets_as_many_experts_as_can_be_expected():
    assert draw_ids("uniform", 16, 128, 8).unique().numel() == round(128 * (1 - (1 - 8 / 128) ** 16))
    counts = draw_ids("uniform", 4096, 32, 4).flatten().bincount(minlength=32)
    assert counts.max() < 1.3 * counts.min()


def test_zipf_prefers_the_first_experts():
    counts = draw_ids("zipf", 4096, 64, 1).flatten().bincount(minlength=64).double()
    share = torch.arange(1, 65, dtype=torch.float64).pow(-1.2)
    expected = 4096 * share / share.sum()
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_one_sends_all_tokens_to_the_same_experts():
    ids = draw_ids("one", 7, 32, 4)
    assert (ids[:, 0] == 0).all() and ids.unique().numel() == 4


@pytest.mark.parametrize(("experts", "top_k", "busy"), [(128, 8, 25), (32, 4, 6), (8, 2, 2)])
def test_sparse_leaves_most_experts_without_a_token(experts, top_k, busy):
    assert draw_ids("sparse", 1024, experts, top_k).unique().numel() == busy


def test_calls_share_weights():
    calls = list(make_calls((4, 2, 32, 16), (1, 3), ("uniform", "one"), torch.float16, "cpu"))
    assert [(routing, args.hidden_states.shape[0]) for routing, args in calls] == [
        ("uniform", 1), ("uniform", 3), ("one", 1), ("one", 3),
    ]  # fmt: skip
    assert len({args.w1.data_ptr() for _, args in calls}) == 1
    assert all(args.topk_ids.dtype == torch.int32 and args.w1.dtype == torch.float16 for _, args in calls)


# Whole runs on the CPU.


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU that is the CPU: our paths are the reference, and everything takes a millisecond."""

    def start_session(rounds, *, graph, fp8=False):
        def sample(call):
            call()
            return harness.Sample(1.0)

        def read(nbytes):
            return None

        ceilings = dict.fromkeys(("cublas", "stream", "scaled_mm") if fp8 else ("cublas", "stream"), lambda: None)
        return measure.Session(rounds, False, ceilings, lambda: None, sample, read)

    def stages(path, args, check):
        names = ["route", "up", "down", "combine"]
        if args.quantization in ("fp8_w8a8", "int8_w8a8"):
            # One token is multiplied as it is, without a sort.
            names = ["quantize", *names] if args.hidden_states.shape[0] > 1 else ["up", "down"]
        return {f"{path}.{stage}": lambda: None for stage in names}

    def own_call(args, path):
        return call(args, path if path == "auto" else "reference")

    plan = SimpleNamespace(variant="sorted", block_m=16, source="heuristic")
    call = measure.own_call
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="0.0"))
    monkeypatch.setattr(bench, "_DEVICE", "cpu")
    monkeypatch.setattr(bench, "start_session", start_session)
    monkeypatch.setattr(measure, "own_call", own_call)
    monkeypatch.setattr(measure, "_plan", lambda args, path: (None, plan))
    monkeypatch.setattr(measure, "_stages", stages)


def run(tmp_path, *arguments: str) -> dict:
    file = tmp_path / "out.json"
    common = ["--shape", SHAPE, "--tokens", "1,40", "--rounds", "3", "--dtype", "float16"]
    assert main(["bench", *common, "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def test_run(fake_gpu, capsys, tmp_path):
    record = run(tmp_path, "--stages", "--routing", "uniform", "--routing", "one", "--routing", "one")
    out = capsys.readouterr().out
    assert record["device"] == "Fake GPU" and record["mode"] == "graph" and record["dtype"] == "float16"
    assert [(cell["routing"], cell["tokens"]) for cell in record["cells"]] == [
        ("uniform", 1), ("uniform", 40), ("one", 1), ("one", 40),
    ]  # fmt: skip
    cell = record["cells"][-1]
    assert cell["ms"] == {"tma": 1.0, "classic": 1.0, "grouped_mm": 1.0} and cell["errors"] == {}
    assert cell["spread_ms"]["tma.up"] == [1.0, 1.0] and len(cell["spread_ms"]) == 3 + 2 * 4 + 2
    assert cell["experts_met"] == 2 and cell["sizes"] == [4, 2, 32, 16]
    assert 0 < max(cell["differences"].values()) < 2e-3
    path = cell["paths"]["classic"]
    assert path["padded_rows"] == 2 * 48 and path["padded_limit_ms"] >= cell["limit_ms"]
    assert path["stages"]["up"]["us"] == 1000 and 0 < path["stages"]["op_over_stages"] < 1
    assert "op / stages" in out and "of padded" in out and "largest rms difference from ours" in out
    assert out.count("E4-k2-H32-I16") == 4


def test_kernels_are_compiled_before_anything_is_timed(fake_gpu, capsys, monkeypatch, tmp_path):
    """Those of all calls in one go, by as many processes as asked; with 0 by nobody."""
    seen = []

    def compile_ahead(calls, device, workers, step):
        seen.append((list(calls), device.kind, workers))
        return Ahead(kernels=7, missing=5, workers=workers, seconds=2.0, errors=["RuntimeError: no"])

    monkeypatch.setattr(bench, "compile_ahead", compile_ahead)
    monkeypatch.setattr(bench, "start_session", lambda *args, original=bench.start_session, **options: (
        seen.append("session") or original(*args, **options)))  # fmt: skip
    run(tmp_path)
    # On the CPU, where the fake's calls run, there is nothing to compile.
    assert seen == [([], "cpu", default_workers()), "session"]
    assert "kernels: 5 of 7 compiled in 2 s, 1 of them in vain: RuntimeError: no" in capsys.readouterr().out
    run(tmp_path, "--workers", "3")
    assert seen[2:] == [([], "cpu", 3), "session"]
    run(tmp_path, "--workers", "0")
    assert seen[4:] == ["session"] and "kernels:" not in capsys.readouterr().out.partition("compiled")[2]


def test_what_a_run_launches():
    """Of every shape and number of tokens the path that the op takes, and each variant of ours; no peer."""
    device = known_card("h200").device
    arguments = ["bench", "--shape", "8,2,256,128", "--tokens", "1,512"]
    options = make_parser().parse_args([*arguments, "--variant", "classic", "--variant", "grouped_mm"])
    calls = [call for call, _ in bench.own_calls(options, device)]
    assert [(call.tokens, call.path) for call in calls] == [
        (1, "tma"), (1, "classic"), (512, "tma"), (512, "classic"),
    ]  # fmt: skip
    options = make_parser().parse_args([*arguments, "--format", "fp8_block"])
    assert {(call.format, call.path) for call, _ in bench.own_calls(options, device)} == {
        ("fp8_block", "tma"), ("fp8_block", "classic"),
    }  # fmt: skip
    assert not list(bench.own_calls(options, known_card("a100").device))  # has no fp8
    options = make_parser().parse_args(["bench", "--common", "--variant", "heuristic", "--variant", "tuned"])
    assert len(list(bench.own_calls(options, device))) == 3 * 7 * sum("none" in one.formats for one in COMMON)


def test_a_wrong_result_is_not_timed(fake_gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(PEERS, "liar", Peer(("grouped", "prepare")))
    monkeypatch.setattr(Peer, "prepare", lambda self, args: lambda: torch.zeros_like(args.hidden_states))
    record = run(tmp_path, "--variant", "tma", "--variant", "liar")
    assert [cell["ms"] for cell in record["cells"]] == [{"tma": 1.0, "liar": None}] * 2
    assert all("wrong result" in cell["errors"]["liar"] for cell in record["cells"])
    assert "liar: ValueError: wrong result" in capsys.readouterr().err


def test_peers_that_cannot_run_are_listed(fake_gpu, capsys, monkeypatch, tmp_path):
    def fails(self, args):
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(Peer, "prepare", fails)
    record = run(tmp_path, "--variant", "tma", "--variant", "vllm", "--variant", "grouped_mm")
    captured = capsys.readouterr()
    assert set(record["unavailable"]) == {"vllm"} and list(record["variants"]) == ["tma", "grouped_mm"]
    assert "not measured: vllm: " in captured.out
    assert record["cells"][0]["errors"] == {"grouped_mm": "RuntimeError: two lines"}
    assert "grouped_mm: RuntimeError: two lines" in captured.err


def test_nothing_to_time(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "nothing to time: vllm: " in error_of(capsys, "--variant", "vllm")


def test_peers_adds_all_that_import(monkeypatch):
    monkeypatch.setattr(Peer, "obstacle", lambda self: "not installed" if "vllm" in self.modules else None)
    options = SimpleNamespace(variant=["classic"], peers=True, format="none")
    variants, unavailable = bench.choose_variants(options)
    assert variants == ["classic", *(name for name in PEERS if name != "vllm")]
    assert unavailable == {"vllm": "not installed"}


def test_recorded_peers_stand_beside(fake_gpu, capsys, tmp_path):
    cell = {"shape": "E4-k2-H32-I16", "tokens": 40, "ms": {"slow": 3.0, "quick": 2.0}}
    peers = {"dtype": "float16", "cublas_tflops": {"short": 1000.0}, "stream_gbs": 4000.0, "cells": [cell]}
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    record = run(tmp_path, "--recorded", str(tmp_path / "peers.json"), "--routing", "uniform", "--routing", "one")
    first, second, *others = record["cells"]
    assert first["recorded"] is None and all(cell["recorded"] is None for cell in others)
    rate = second["stream_gbs"] if second["bound"] == "bytes" else second["cublas_tflops"]
    ceiling = 4000.0 if second["bound"] == "bytes" else 1000.0
    assert second["recorded"] == {"name": "quick", "ms": 2.0, "scaled_ms": pytest.approx(2.0 * ceiling / rate)}
    out = capsys.readouterr().out
    assert "recorded ms" in out and out.count("quick") == 1


def test_run_plots(fake_gpu, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, "--plot", str(tmp_path / "plots"), "--routing", "zipf")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["bench-E4-k2-H32-I16-zipf.png"]
    assert "bench-E4-k2-H32-I16-zipf.png" in capsys.readouterr().out


# Formats.


@pytest.mark.parametrize("name", FORMATS)
def test_run_of_a_format(fake_gpu, capsys, tmp_path, name):
    record = run(tmp_path, "--format", name, "--stages")
    out = capsys.readouterr().out
    assert record["format"] == name and list(record["variants"]) == ["tma", "classic"]
    assert f"dtype=float16 format={name} mode=graph" in out
    scaled = name.startswith("fp8") or name in ("int8_channel", "int8_block")
    for cell in record["cells"]:
        assert cell["errors"] == {} and cell["ms"] == {"tma": 1.0, "classic": 1.0}
        assert 0 <= cell["oracle"]["tma"] < 1  # the fake's paths are the oracle, rounded
        assert ("scaled_mm" in cell["spread_ms"]) == (cell["scaled_mm_tflops"] is not None) == scaled
    assert "largest rms error over the emulator's: tma 0." in out
    one, many = (line for line in out.splitlines() if line.startswith("    tma"))
    assert ("quantize 1000.0 us" in many, "of scaled_mm" in many) == (scaled, scaled)
    assert "quantize" not in one and ("route" in one) != scaled


def test_a_format_and_its_recorded_peers(fake_gpu, capsys, tmp_path):
    cell = {"shape": "E4-k2-H32-I16", "tokens": 40, "ms": {"slow": 3.0, "quick": 2.0}}
    rates = {"cublas_tflops": {"short": 1000.0}, "stream_gbs": 4000.0}
    peers = {"dtype": "float16", "formats": ["fp8_block"], **rates, "cells": [cell]}
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    record = run(tmp_path, "--format", "fp8_block", "--recorded", str(tmp_path / "peers.json"))
    assert [cell["recorded"] and cell["recorded"]["name"] for cell in record["cells"]] == [None, "quick"]
    assert capsys.readouterr().out.count("quick") == 1


def test_a_format_whose_op_fails_in_a_cell(fake_gpu, capsys, monkeypatch, tmp_path):
    call = measure.own_call

    def own_call(args, path):
        if args.hidden_states.shape[0] == 1:
            raise RuntimeError("no kernel")
        return call(args, path)

    monkeypatch.setattr(measure, "own_call", own_call)
    first, second = run(tmp_path, "--format", "mxfp4", "--stages")["cells"]
    assert first["errors"] == {"ours": "RuntimeError: no kernel"} and first["ms"] == {"tma": None, "classic": None}
    assert second["errors"] == {} and second["ms"]["tma"] == 1.0
    assert "ours: RuntimeError: no kernel" in capsys.readouterr().err


def test_a_wrong_quantised_result_is_not_timed(fake_gpu, monkeypatch, tmp_path):
    call = measure.own_call

    def own_call(args, path):
        return call(replace(args, w2_scale=args.w2_scale * 1.3) if path == "classic" else args, path)

    monkeypatch.setattr(measure, "own_call", own_call)
    cells = run(tmp_path, "--format", "fp8_channel")["cells"]
    assert [cell["ms"] for cell in cells] == [{"tma": 1.0, "classic": None}] * 2
    assert all("wrong result" in cell["errors"]["classic"] for cell in cells)
