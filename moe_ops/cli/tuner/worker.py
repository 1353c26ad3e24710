"""The process that runs and times candidates; see `pool.Pool` for what it says, and to whom it may happen to end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from moe_ops.arguments import Arguments
from moe_ops.cli import harness
from moe_ops.cli.calls import make_call, make_weights
from moe_ops.cli.check import Check, prepare_check
from moe_ops.cli.env import versions
from moe_ops.cli.measure import forced
from moe_ops.cli.tuner.calls import Call, tiles_from_json
from moe_ops.cli.tuner.serving import Send, one_line, serve
from moe_ops.devices import describe
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles

# Tokens of a winner's result that the reference computes too.
_VERIFIED_TOKENS = 32
_KEPT_CALLS = 4
# Weights of so many shapes stay, since calls of two follow each other closely.
_KEPT_SHAPES = 2
# Above so many candidates, those that one sample shows slower than the fastest by this factor are timed no more.
_FEW, _SLOW = 6, 1.25


def main(connection, log: str | None = None, device: str = "cuda") -> None:
    """Answers requests until the other end is closed, or the device is broken.

    Args:
        connection: to the pool.
        log: file for what compilers and drivers print; None for nowhere.
        device: "cuda", or "cpu" for Triton's interpreter, which has no clock and no races.
    """
    serve(connection, log, lambda: Engine(device))


class Engine:
    """Calls on one device, ready to be made with any tiles."""

    def __init__(self, device: str) -> None:
        """Prepares nothing yet."""
        self._device = device
        self._weights: dict[Call, dict[str, object]] = {}
        self._calls: dict[Call, tuple[Arguments, Check]] = {}
        self._flush: harness.L2Flush | None = None

    def hello(self) -> dict:
        """What the tuner has to know of the device and the versions."""
        memory = torch.cuda.get_device_properties(0).total_memory if self._device == "cuda" else 0
        facts = asdict(describe(torch.device(self._device, 0)))
        return {"device": facts, "versions": versions(), "memory": memory}

    def broken(self) -> bool:
        """Whether the device does no more work for this process."""
        try:
            return int(torch.arange(64, device=self._device).sum()) != 2016
        except RuntimeError:
            return True

    @torch.no_grad()
    def answer(self, request: Mapping, send: Send) -> object:
        """Does what a request asks for: "race" or "verify"; returns its result."""
        call = Call.from_json(request["call"])
        tiles = [tiles_from_json(value) for value in request["candidates"]]
        args, check = self._prepared(call)
        if request["op"] == "race":
            return self._race(call, args, check, tiles, request["rounds"], send)
        send({"event": "begin", "index": 0})
        return self._verify(args, forced(args, call.path, tiles[0])())

    def _prepared(self, call: Call) -> tuple[Arguments, Check]:
        """The arguments of a call, and the result of the heuristic's tiles, against which others are checked first."""
        if call not in self._calls:
            if len(self._calls) >= _KEPT_CALLS:
                self._calls.clear()
            dtype = getattr(torch, call.dtype)
            args = make_call(call.sizes, self._weights_of(call), call.tokens, "uniform", dtype, self._device)
            expected = forced(args, call.path, self._own(call))()
            self._calls[call] = args, prepare_check(args, expected)
        return self._calls[call]

    def _weights_of(self, call: Call) -> dict[str, object]:
        shape = replace(call, tokens=1)
        if shape not in self._weights:
            if len(self._weights) >= _KEPT_SHAPES:
                self._forget()
            try:
                self._weights[shape] = self._make_weights(call)
            except torch.OutOfMemoryError:
                if not self._weights:
                    raise
                self._forget()
                self._weights[shape] = self._make_weights(call)
        return self._weights[shape]

    def _make_weights(self, call: Call) -> dict[str, object]:
        return make_weights(call.sizes, getattr(torch, call.dtype), self._device, call.form)

    def _forget(self) -> None:
        self._weights.clear()
        self._calls.clear()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _own(self, call: Call) -> Tiles:
        return heuristic_tiles(call.problem(), describe(torch.device(self._device, 0)), call.path)

    def _race(self, call: Call, args: Arguments, check: Check, tiles: Sequence[Tiles], rounds: int, send: Send
              ) -> list[float | None]:  # fmt: skip
        """Median milliseconds of each candidate by turns in every round, None of one that failed or is wrong."""
        pool = torch.cuda.graph_pool_handle()
        ready: dict[str, harness.Call] = {}
        for number, candidate in enumerate(tiles):
            send({"event": "begin", "index": number})
            try:
                run = forced(args, call.path, candidate)
                result = run()
                check.difference(result)
                check.oracle(result)
                del result
                captured = harness.capture(run, pool)
            except Exception as error:  # the candidate's own failure, unless the device is gone
                if self.broken():
                    raise
                if self._device == "cuda":
                    torch.cuda.empty_cache()  # what ran out of memory left it full
                send({"event": "skip", "index": number, "error": one_line(error)})
                continue
            captured.result = None  # its memory serves the next graph
            ready[str(number)] = captured
        if self._flush is None:
            self._flush = harness.L2Flush()
        medians: dict[str, float] = {}
        if len(ready) > _FEW:
            medians = self._time(ready, 1)
            most = _SLOW * min(medians.values())
            ready = {name: call for name, call in ready.items() if medians[name] <= most}
        medians |= self._time(ready, rounds)
        return [medians.get(str(number)) for number in range(len(tiles))]

    def _time(self, ready: dict[str, harness.Call], rounds: int) -> dict[str, float]:
        timings = harness.time_round_robin(ready, rounds, harness.device_milliseconds, self._flush)
        return {name: timings.median(name) for name in ready}

    @staticmethod
    def _verify(args: Arguments, out: torch.Tensor) -> dict[str, float]:
        """Holds some tokens of a result, from the first to the last one, against the reference rule."""
        from moe_ops.testing import assert_correct

        count = args.hidden_states.shape[0]
        some = min(count, _VERIFIED_TOKENS)
        tokens = torch.arange(some, device=args.hidden_states.device) * (count - 1) // max(1, some - 1)
        few = replace(args, **{name: getattr(args, name)[tokens] for name in _PER_TOKEN})
        got = assert_correct(out[tokens], few)
        return {"rms": got.rms, "max": got.max}


_PER_TOKEN = ("hidden_states", "topk_weights", "topk_ids")
