"""The tuner's worker in Triton's interpreter: it tries and verifies real tiles; clock and graphs are made up."""

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

CALLS = {
    form: Call((4, 2, 128, 64), 9, "float16", form, "classic") for form in ("none", "int8_channel", "int4", "fp8_block")
}
GOOD = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(16, 64, 64))


def request(op: str, call: Call, *tiles: Tiles, **more) -> dict:
    return {"op": op, "call": call.to_json(), "candidates": [tiles_to_json(t) for t in tiles], **more}


@pytest.mark.parametrize("name", CALLS)
def test_trial_and_verification(name):
    call, engine, events = CALLS[name], worker.Engine("cpu"), []
    own = heuristic_tiles(call.problem(), describe(torch.device("cpu")), call.path)
    for tiles in (own, GOOD):
        assert tiles_from_json(tiles_to_json(tiles)) == tiles
        assert engine.answer(request("trial", call, tiles), events.append)["difference"] < 2e-3
        found = engine.answer(request("verify", call, tiles), events.append)
        assert 0 < found["rms"] <= found["max"]
    assert events == [{"event": "begin", "index": 0}] * 4
    assert not engine.broken()


def test_a_wrong_result_is_an_error(monkeypatch):
    call, engine = CALLS["none"], worker.Engine("cpu")
    engine.answer(request("trial", call, GOOD), lambda event: None)
    forced = worker.forced
    monkeypatch.setattr(worker, "forced", lambda *args: lambda: forced(*args)() * 1.01)
    with pytest.raises(ValueError, match="wrong result"):
        engine.answer(request("trial", call, GOOD), lambda event: None)
    with pytest.raises(AssertionError, match="rms error"):
        engine.answer(request("verify", call, GOOD), lambda event: None)


def test_tiles_that_cannot_be_are_an_error():
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    engine, events = worker.Engine("cpu"), []
    with pytest.raises(ValueError, match="both must be the same"):
        engine.answer(request("trial", CALLS["none"], wrong), events.append)
    assert events == [{"event": "begin", "index": 0}]


def test_a_process_of_its_own(tmp_path):
    """Through the pool: what the worker says can be read, it outlives a candidate that fails, and it prints nowhere."""
    call, log = CALLS["none"], tmp_path / "log"
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    asked = [request("trial", call, GOOD), request("trial", call, wrong), request("verify", call, GOOD)]
    with Pool(worker.main, (str(log), "cpu"), limit=100) as pool:
        hello = pool.hello()
        trial, failed, verified = pool.run(asked, 1)
    assert hello["device"]["interpreted"] and hello["versions"]["torch"] == torch.__version__
    assert trial.error is None and trial.result["difference"] < 2e-3
    assert failed.culprit == 0 and failed.error.startswith("ValueError: up.block_m is 16")
    assert verified.error is None and verified.result["rms"] > 0
    assert log.exists()


def test_race(monkeypatch):
    """Every candidate takes its turn; one that cannot be captured is said, and the others go on."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(harness, "L2Flush", lambda: lambda: None)
    monkeypatch.setattr(harness, "device_milliseconds", lambda captured: float(captured().shape[0]))

    def capture(call, pool):
        call()
        return harness.Captured(None, None, keep=call)

    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness.Captured, "__call__", lambda captured: captured.keep())
    wrong = Tiles("sorted", TileConfig(16, 32, 64), TileConfig(32, 64, 64))
    events = []
    times = worker.Engine("cpu").answer(request("race", CALLS["none"], GOOD, wrong, GOOD, rounds=2), events.append)
    assert times == [9.0, None, 9.0]
    assert [event["event"] for event in events] == ["begin", "begin", "skip", "begin"]
    assert events[2]["index"] == 1 and "both must be the same" in events[2]["error"]
