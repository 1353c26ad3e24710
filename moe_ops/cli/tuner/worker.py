"""The process that tries and times candidates; see `pool.Pool` for what it says, and to whom it may happen to end."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from moe_ops.arguments import Arguments
from moe_ops.cli import harness
from moe_ops.cli.calls import make_call, make_weights
from moe_ops.cli.check import Check, prepare_check
from moe_ops.cli.env import versions
from moe_ops.cli.measure import own_call
from moe_ops.cli.tuner.calls import Call, tiles_from_json
from moe_ops.devices import describe
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles

# Tokens of a winner's result that the reference computes too.
_VERIFIED_TOKENS = 32
_KEPT_CALLS = 4

Send = Callable[[dict], None]


def main(connection, log: str | None = None, device: str = "cuda") -> None:
    """Answers requests until the other end is closed, or the device is broken.

    Args:
        connection: to the pool.
        log: file for what compilers and drivers print; None for nowhere.
        device: "cuda", or "cpu" for Triton's interpreter, which has no clock and no races.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    _redirect(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: dict) -> None:
        connection.send_bytes(json.dumps(event).encode())

    engine = Engine(device)
    send({"event": "ready", **engine.hello()})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            send({"event": "done", "result": engine.answer(request, send)})
        except Exception as error:  # of compilers and drivers: any
            broken = engine.broken()
            send({"event": "failed", "error": _one_line(error), "broken": broken})
            if broken:
                return


def _redirect(log: str | None) -> None:
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)


def _end_with_parent() -> None:
    """A kernel that hangs lets no exception through: where the parent is killed, nobody else would end this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Engine:
    """Calls on one device, ready to be made with any tiles."""

    def __init__(self, device: str) -> None:
        """Prepares nothing yet."""
        self._device = device
        self._weights: tuple[Call, dict[str, object]] | None = None
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
        """Does what a request asks for: "trial", "race" or "verify"; returns its result."""
        call = Call.from_json(request["call"])
        tiles = [tiles_from_json(value) for value in request["candidates"]]
        args, check = self._prepared(call)
        if request["op"] == "race":
            return self._race(call, args, tiles, request["rounds"], send)
        send({"event": "begin", "index": 0})
        out = forced(args, call.path, tiles[0])()
        if request["op"] == "trial":
            return {"difference": check.difference(out), "oracle": check.oracle(out)}
        return self._verify(args, out)

    def _prepared(self, call: Call) -> tuple[Arguments, Check]:
        """The arguments of a call, and the result of the heuristic's tiles, against which others are checked first."""
        shape = replace(call, tokens=1)
        if self._weights is None or self._weights[0] != shape:
            self._weights = None
            self._calls.clear()
            if self._device == "cuda":
                torch.cuda.empty_cache()
            self._weights = shape, make_weights(call.sizes, getattr(torch, call.dtype), self._device, call.form)
        if call not in self._calls:
            if len(self._calls) >= _KEPT_CALLS:
                self._calls.clear()
            dtype = getattr(torch, call.dtype)
            args = make_call(call.sizes, self._weights[1], call.tokens, "uniform", dtype, self._device)
            expected = forced(args, call.path, self._own(call))()
            self._calls[call] = args, prepare_check(args, expected)
        return self._calls[call]

    def _own(self, call: Call) -> Tiles:
        return heuristic_tiles(call.problem(), describe(torch.device(self._device, 0)), call.path)

    def _race(self, call: Call, args: Arguments, tiles: Sequence[Tiles], rounds: int, send: Send) -> list[float | None]:
        """Median milliseconds of each candidate by turns in every round, None of one that failed."""
        pool = torch.cuda.graph_pool_handle()
        ready: dict[str, harness.Call] = {}
        for number, candidate in enumerate(tiles):
            send({"event": "begin", "index": number})
            try:
                captured = harness.capture(forced(args, call.path, candidate), pool)
            except Exception as error:  # the candidate's own failure, unless the device is gone
                if self.broken():
                    raise
                if self._device == "cuda":
                    torch.cuda.empty_cache()  # what ran out of memory left it full
                send({"event": "skip", "index": number, "error": _one_line(error)})
                continue
            captured.result = None  # its memory serves the next graph
            ready[str(number)] = captured
        if self._flush is None:
            self._flush = harness.L2Flush()
        timings = harness.time_round_robin(ready, rounds, harness.device_milliseconds, self._flush)
        return [timings.median(str(number)) for number in range(len(tiles))]

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


def forced(args: Arguments, path: str, tiles: Tiles) -> harness.Call:
    """A call with these tiles, whatever the heuristic or a table says."""
    from moe_ops.testing import override

    call = own_call(args, path)

    def run() -> torch.Tensor:
        with override(path=path, variant=tiles.variant, config=(tiles.up, tiles.down)):
            return call()

    return run
