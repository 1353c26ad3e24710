"""The bench's harness and limits: turns, captures, and what is computed from times. The device is made up."""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch

from moe_ops.cli import harness, table
from moe_ops.cli.limits import Rates, Work, stage_report, work_of
from moe_ops.testing import random_inputs


def test_round_robin_takes_turns_and_drops_the_first_round():
    log, clock = [], itertools.count(1.0)

    def sample(call):
        call()
        return harness.Sample(next(clock))

    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    timings = harness.time_round_robin(calls, 2, sample, lambda: log.append("flush"))
    assert log == ["flush", "a", "flush", "b", "flush", "c"] * 3
    assert timings.rounds == {"a": [4.0, 7.0], "b": [5.0, 8.0], "c": [6.0, 9.0]}
    assert timings.median("b") == 6.5 and timings.median("d") is None


def test_a_late_sample_is_taken_again_after_more():
    """At most four times; what the last one took counts then."""
    log, late = [], iter([False, True, True, False, *[True] * 4])

    def sample(call):
        call()
        return harness.Sample(float(log.count("call")), next(late))

    timings = harness.time_round_robin({"call": lambda: log.append("call")}, 2, sample, lambda: log.append("flush"))
    flushes = "".join("c" if entry == "call" else "." for entry in log)
    assert flushes == ".c" + ".c..c....c" + ".c..c....c........c"
    assert timings.rounds == {"call": [4.0, 8.0]}


@pytest.mark.parametrize("waits", [False, True])
def test_a_sample_is_late_if_the_device_waits(monkeypatch, waits):
    """It does if it is past the start when all is enqueued, and not yet waited for."""
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def query(self) -> bool:
            log.append("query")
            return waits

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert harness.device_milliseconds(lambda: log.append("call")) == (2.5, waits)
    assert log == ["record", "call", "record", "query", "synchronize"]


class FakeCuda:
    """Logs what is done to `torch.cuda`, and lets captures run on the CPU."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.sync_mode = [], 0
        cuda, outer = torch.cuda, self

        class Stream:
            def wait_stream(self, other) -> None:
                pass

        class CUDAGraph:
            def replay(self) -> None:
                outer.log.append("replay")

        @contextlib.contextmanager
        def graph(graph, pool=None):
            outer.log.append("begin" if pool is None else f"begin in {pool}")
            yield
            outer.log.append("end")

        def set_sync_debug_mode(mode) -> None:
            outer.sync_mode = mode

        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "current_stream", Stream)
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "synchronize", lambda: None)
        monkeypatch.setattr(cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(cuda, "graph", graph)
        monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: outer.sync_mode)
        monkeypatch.setattr(cuda, "set_sync_debug_mode", set_sync_debug_mode)


def test_capture_warms_up_and_returns_the_result(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call():
        cuda.log.append(f"call {cuda.sync_mode}")
        return "result"

    captured = harness.capture(call)
    assert cuda.log == ["call 0", "call error", "begin", "call 0", "end"]
    assert captured() == "result" and cuda.log[-1] == "replay"
    harness.capture(call, pool=(0, 7))
    assert "begin in (0, 7)" in cuda.log


def test_a_capture_keeps_the_operands(monkeypatch):
    FakeCuda(monkeypatch)
    operand = torch.ones(3)
    alive = weakref.ref(operand)
    captured = harness.capture(functools.partial(torch.neg, operand))
    del operand
    assert alive() is not None
    del captured
    assert alive() is None


def test_a_call_that_waits_is_not_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call():
        if cuda.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        harness.capture(call)
    assert cuda.log == [] and cuda.sync_mode == 0


def test_each_stage_is_captured_alone(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def start():
        try:
            for name in ("route", "up", "down"):
                cuda.log.append(name)
                yield name
            cuda.log.append("past the last stage")
        finally:
            cuda.log.append("freed")

    stages = harness.capture_stages(start)
    warm_up = ["route", "up", "down", "past the last stage", "freed"]
    captures = ["begin", "route", "end", "begin", "up", "end", "begin", "down", "end"]
    assert list(stages) == ["route", "up", "down"] and cuda.log == warm_up + captures
    # The workspaces are there as long as one of the graphs is.
    up = stages.pop("up")
    stages.clear()
    up()
    assert cuda.log[-1] == "replay"
    del up
    assert cuda.log[-1] == "freed"


# Limits.

RATES = Rates(teraflops=800.0, gigabytes=4000.0)


def test_rates():
    assert RATES.limit(800e9, 1e6) == (pytest.approx(1.0), "flops")
    assert RATES.limit(1e9, 8e9) == (pytest.approx(2.0), "bytes")


def test_work_of_a_call():
    args = random_inputs(num_tokens=5, hidden=32, intermediate=16, experts=4, top_k=2, dtype=torch.float16)
    args.topk_ids = torch.tensor([[0, 1], [0, 1], [0, 3], [0, 1], [0, 1]], dtype=torch.int32)
    work = work_of(args)
    assert work.counts == (5, 4, 1) and work.experts_met == 3 and work.routes == 10
    assert (work.up_flops, work.down_flops) == (2 * 32 * 32, 2 * 32 * 16)
    assert work.up_weight_bytes == 3 * 32 * 32 * 2 and work.down_weight_bytes == 3 * 32 * 16 * 2
    assert (work.token_bytes, work.act_bytes, work.rows_bytes) == (5 * 32 * 2, 10 * 16 * 2, 10 * 32 * 2)
    assert [work.padded_rows(block) for block in (1, 4, 16)] == [10, 8 + 4 + 4, 48]


def work(counts=(100, 28), down_flops=10**9):
    return Work(counts, 2 * 10**9, down_flops, 400, 200, 10, 40, 80)


def test_limit_counts_real_or_padded_rows():
    assert work().limit(RATES) == (pytest.approx(128 * 3e9 / 800e9), "flops")
    assert work().limit(RATES, 256)[0] == pytest.approx(256 * 3e9 / 800e9)
    few = Work((1,), 1, 1, 4 * 10**6, 4 * 10**6, 0, 0, 0)
    assert few.limit(RATES) == (pytest.approx(2e-3), "bytes")


def test_stage_report():
    report = stage_report(work(), RATES, {"route": 0.01, "up": 0.4, "down": 0.2, "combine": 1e-4}, 0.66)
    assert report["route"] == {"us": pytest.approx(10)}
    assert report["up"] == {
        "us": 400.0, "tflops": pytest.approx(640), "of_cublas": pytest.approx(0.8),
        "of_limit": pytest.approx(0.8), "bound": "flops",
    }  # fmt: skip
    assert report["combine"]["gbs"] == pytest.approx(90 / 1e-4 / 1e6)
    assert report["combine"]["of_stream"] == pytest.approx(report["combine"]["gbs"] / 4000)
    assert report["op_over_stages"] == pytest.approx(0.66 / (0.6 + 90 / 4000e6))


def test_stage_report_without_a_combine():
    """The variants without a sort sum in the down launch."""
    report = stage_report(work(down_flops=0), RATES, {"up": 0.4, "down": 0.2}, 0.66)
    assert report.keys() == {"up", "down", "op_over_stages"}
    assert report["op_over_stages"] == pytest.approx(1.1)
    assert report["down"]["of_limit"] == pytest.approx((200 + 40 + 10) / 4000e6 / 0.2)
    assert "op_over_stages" not in stage_report(work(), RATES, {"up": 0.4, "down": 0.2}, None)


# Lines.


def cell(**changes):
    paths = {
        "tma": {"variant": "pingpong", "padded_limit_ms": 0.9},
        "classic": {"variant": "sorted", "padded_limit_ms": 0.95},
    }
    return {
        "shape": "mixtral-8x7b", "routing": "zipf", "tokens": 4096, "ms": {"tma": 1.0, "classic": 2.0, "vllm": None},
        "limit_ms": 0.8, "paths": paths,
    } | changes  # fmt: skip


def test_row_and_header_line_up():
    variants = ["tma", "classic", "vllm"]
    header, row = table.header(variants, recorded=False), table.row(cell(), variants, recorded=False)
    assert len(header) == len(row)
    assert row.split() == ["mixtral-8x7b", "zipf", "4096", "1.0000", "2.0000", "-", "0.8000", "0.80", "0.90"]


def test_row_with_recorded_peer():
    best = {"name": "vLLM 0.22.1", "ms": 1.5, "scaled_ms": 1.4}
    row = table.row(cell(recorded=best), ["tma"], recorded=True)
    header = table.header(["tma"], recorded=True)
    assert row.endswith("  1.5000       1.4000  vLLM 0.22.1") and len(row) == len(header) + len("  vLLM 0.22.1")
    assert table.row(cell(recorded=None), ["tma"], recorded=True).split()[-2:] == ["-", "-"]


def test_row_without_a_path_of_ours():
    row = table.row(cell(ms={"vllm": 1.0}, paths={}), ["vllm"], recorded=False)
    assert row.split()[-2:] == ["-", "-"] and len(row) == len(table.header(["vllm"], recorded=False))


def test_stage_lines():
    stages = stage_report(work(), RATES, {"route": 0.01, "up": 0.4, "down": 0.2, "combine": 1e-4}, 0.66)
    (line,) = table.stage_lines(cell(paths={"tma": {"variant": "pingpong", "stages": stages}, "classic": {}}))
    assert line.startswith("    tma (pingpong): route 10.0 us; up 400.0 us 640 TF/s 0.80 of cuBLAS 0.80 of limit")
    assert "GB/s" in line and line.endswith("op / stages 1.10")
