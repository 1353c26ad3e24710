"""Compiling ahead never ends a run: what fails there fails again, and says so, where it is launched."""

import pytest

pytest.importorskip("triton")

from moe_ops.cli import ahead
from moe_ops.cli.known import known_card
from moe_ops.cli.tuner.pool import Answer, PoolError

DEVICE = known_card("h200").device


@pytest.fixture
def pool(monkeypatch):
    """Calls of 20 kernels in 6 parts, and a pool that answers as told; gives what it was asked."""

    class Told:
        def __init__(self, limit):
            self._waiting = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.asked.append("end")

        def open(self, lane, target, arguments, workers):
            self.asked.append(workers)

        def submit(self, lane, request, done, order):
            self._waiting.append(done)

        def step(self):
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            self._waiting.pop(0)(answer)

    def missing(calls, device, result):
        result.kernels, result.missing = 30, missing.count
        return [(0, {"part": number}) for number in range(6)]

    missing.count = 20
    Told.answers, Told.asked, Told.missing = [], [], missing
    monkeypatch.setattr(ahead, "Pool", Told)
    monkeypatch.setattr(ahead, "_missing", missing)
    return Told


def test_a_kernel_that_fails(pool):
    pool.answers = [Answer(1)] * 2 + [Answer(error="ValueError: no such tile")] + [Answer(1)] * 3
    steps = []
    found = ahead.compile_ahead([], DEVICE, 4, lambda *step: steps.append(step))
    assert steps == [(done, 6) for done in range(1, 7)] and pool.asked == [4, "end"]
    assert found.errors == ["ValueError: no such tile"] and found.workers == 4
    assert str(found) == "kernels: 20 of 30 compiled in 0 s, 1 of them in vain: ValueError: no such tile"


def test_workers_that_do_not_start(pool):
    pool.answers = [PoolError("3 workers in a row ended")]
    found = ahead.compile_ahead([], DEVICE, 100)
    assert pool.asked == [6, "end"]  # no more than there are parts
    assert found.errors == ["3 workers in a row ended"]


def test_few_kernels_are_left_to_their_launch(pool):
    pool.missing.count = 3
    found = ahead.compile_ahead([], DEVICE, 4)
    assert pool.asked == [] and found.workers == 0 and found.errors == []
    assert str(found) == "kernels: 30, of which Triton's cache lacks 3"


@pytest.mark.parametrize("card", ["a100", "h200"])
def test_calls_that_cannot_run_are_left_out(card):
    shapes, names = [(8, 2, 256, 128)], ("auto", "classic", "tma")
    planned = ahead.planned(shapes, [16], "bfloat16", "fp8_block", names, known_card(card).device)
    calls = [call.path for call, _ in planned]
    assert calls == ([] if card == "a100" else ["tma", "classic", "tma"])
