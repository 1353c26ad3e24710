"""The tuner's worker in Triton's interpreter: it races and verifies real tiles; clock and graphs are made up."""

from dataclasses import replace

import pytest
import torch

from moe_ops.cli import harness
from moe_ops.cli.tuner import worker
from moe_ops.cli.tuner.calls import Call, tiles_from_json, tiles_to_json
from moe_ops.cli.tuner.pool import Pool
from moe_ops.devices import describe
from moe_ops.tuning import TileConfig
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles
from tests.amount import params

CALLS = {
    form: Call((4, 2, 128, 64), 9, "float16", form, "classic") for form in ("none", "int8_channel", "int4", "fp8_block")
}
GOOD = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(16, 64, 64))


def request(op: str, call: Call, *tiles: Tiles, **more) -> dict:
    return {"op": op, "call": call.to_json(), "candidates": [tiles_to_json(t) for t in tiles], **more}


@pytest.fixture
def clock(monkeypatch):
    """A device without graphs, on which a call takes its number of tokens in milliseconds."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(harness, "L2Flush", lambda: lambda: None)
    monkeypatch.setattr(harness, "device_milliseconds", lambda captured: harness.Sample(float(captured().shape[0])))

    def capture(call, pool):
        call()
        return harness.Captured(None, None, keep=call)

    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness.Captured, "__call__", lambda captured: captured.keep())


@pytest.fixture
def instant(monkeypatch):
    """Calls that launch nothing."""
    monkeypatch.setattr(worker, "forced", lambda args, path, tiles: lambda: torch.ones_like(args.hidden_states))


@pytest.mark.parametrize("name", params(CALLS, ["none", "int4"]))
def test_race_and_verification(name, clock):
    call, engine, events = CALLS[name], worker.Engine("cpu"), []
    own = heuristic_tiles(call.problem(), describe(torch.device("cpu")), call.path)
    for tiles in (own, GOOD):
        assert tiles_from_json(tiles_to_json(tiles)) == tiles
    assert engine.answer(request("race", call, own, GOOD, rounds=1), events.append) == [9.0, 9.0]
    found = engine.answer(request("verify", call, GOOD), events.append)
    assert 0 < found["rms"] <= found["max"]
    assert events == [{"event": "begin", "index": index} for index in (0, 1, 0)]
    assert not engine.broken()


def test_a_wrong_result_is_an_error(monkeypatch, clock):
    call, engine, events = CALLS["none"], worker.Engine("cpu"), []
    engine.answer(request("race", call, GOOD, rounds=1), events.append)
    forced = worker.forced
    monkeypatch.setattr(worker, "forced", lambda *args: lambda: forced(*args)() * 1.01)
    assert engine.answer(request("race", call, GOOD, rounds=1), events.append) == [None]
    assert events[-1]["event"] == "skip" and "wrong result" in events[-1]["error"]
    with pytest.raises(AssertionError, match="rms error"):
        engine.answer(request("verify", call, GOOD), lambda event: None)


def test_tiles_that_cannot_be_are_an_error():
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    engine, events = worker.Engine("cpu"), []
    with pytest.raises(ValueError, match="both must be the same"):
        engine.answer(request("verify", CALLS["none"], wrong), events.append)
    assert events == [{"event": "begin", "index": 0}]


def test_weights_of_two_shapes_stay(clock, instant):
    """Calls of two shapes take turns, and a third one takes the place of both."""
    engine, calls = worker.Engine("cpu"), [replace(CALLS["none"], sizes=(e, 2, 128, 64)) for e in (4, 5, 6)]
    made = []
    make = engine._make_weights
    engine._make_weights = lambda call: made.append(call.sizes[0]) or make(call)
    for call in (calls[0], calls[1], calls[0], calls[1], calls[2], calls[0]):
        engine.answer(request("race", call, GOOD, rounds=1), lambda event: None)
    assert made == [4, 5, 6, 4]


def test_full_memory_makes_room(clock, instant):
    engine, tried = worker.Engine("cpu"), []
    make = engine._make_weights

    def full(call):
        tried.append(call.sizes[0])
        if engine._weights:
            raise torch.OutOfMemoryError("full")
        return make(call)

    engine._make_weights = full
    for experts in (4, 5):
        call = replace(CALLS["none"], sizes=(experts, 2, 128, 64))
        engine.answer(request("race", call, GOOD, rounds=1), lambda event: None)
    assert tried == [4, 5, 5]


def test_hopeless_candidates_are_timed_once(monkeypatch, clock, instant):
    """Of many, those that one sample shows much slower get no more samples."""
    samples = []

    def milliseconds(captured):
        captured()
        samples.append(id(captured))
        return harness.Sample(1.0 + (id(captured) in slow))

    slow, captures = set(), []
    capture = harness.capture

    def noted(call, pool):
        captures.append(capture(call, pool))
        if len(captures) > 4:
            slow.add(id(captures[-1]))
        return captures[-1]

    monkeypatch.setattr(harness, "capture", noted)
    monkeypatch.setattr(harness, "device_milliseconds", milliseconds)
    times = worker.Engine("cpu").answer(request("race", CALLS["none"], *[GOOD] * 8, rounds=3), lambda event: None)
    assert times == [1.0] * 4 + [2.0] * 4
    counts = [samples.count(id(captured)) for captured in captures]
    assert counts == [2 + 4] * 4 + [2] * 4  # a round that settles comes first each time


def test_a_process_of_its_own(tmp_path):
    """Through the pool: what the worker says can be read, it outlives a candidate that fails, and it prints nowhere."""
    call, log = CALLS["none"], tmp_path / "log"
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    asked = [request("verify", call, wrong), request("verify", call, GOOD)]
    answers = []
    with Pool(limit=100) as pool:
        pool.open("device", worker.main, (str(log), "cpu"))
        hello = pool.hello("device")
        for one in asked:
            pool.submit("device", one, answers.append)
        while len(answers) < 2:
            pool.step()
    failed, verified = answers
    assert hello["device"]["interpreted"] and hello["versions"]["torch"] == torch.__version__
    assert failed.culprit == 0 and failed.error.startswith("ValueError: up.block_m is 16")
    assert verified.error is None and verified.result["rms"] > 0
    assert log.exists()


def test_race(clock):
    """Every candidate takes its turn; one that cannot be captured is said, and the others go on."""
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    events = []
    times = worker.Engine("cpu").answer(request("race", CALLS["none"], GOOD, wrong, GOOD, rounds=2), events.append)
    assert times == [9.0, None, 9.0]
    assert [event["event"] for event in events] == ["begin", "begin", "skip", "begin"]
    assert events[2]["index"] == 1 and "both must be the same" in events[2]["error"]
