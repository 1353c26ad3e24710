"""The search: compile, time, combine the best, time again, verify; keep what beats the heuristic by more than noise.

Nothing here touches a device: a `Runner` does, and in tests a fake one. Every call's search is a generator that yields
requests and is sent their answers, and several are under way at a time: while the candidates of one are timed, those
of the next are compiled.
"""

import json
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moe_ops.cli.tuner.calls import PARTS, Call, part_key, tiles_to_json
from moe_ops.cli.tuner.candidates import first_wave, fitting, second_wave
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Answer
from moe_ops.devices import Device
from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.table import Entry, Tiles

# A winner is this much faster than the heuristic's tiles in rounds of its own, or those are kept.
MARGIN = 0.02
# The lanes of a pool: one worker that has the device for itself, and workers that never touch it.
DEVICE, COMPILE = "device", "compile"
# Samples of each candidate in the first race, in that of the best, and in the final between two.
_FIRST_ROUNDS, _BEST_ROUNDS, _FINAL_ROUNDS = 3, 7, 15
# Candidates of the first race that stay, and finalists that are verified before the search gives up.
_STAYING, _FINALISTS = 5, 3
# Gain in the first race below which what lies further along is not worth compiling.
_PROMISING = 0.005
# Calls under way: enough to keep the compilers busy, and few enough that tables grow as they end.
_TOGETHER = 6

# Yields (bucket, lane, {key: request}), is sent the answers in that order.
Requests = tuple[Bucket, str, dict[str, dict]]
Steps = Generator[Requests, list[Answer], "Found"]


class Runner(Protocol):
    """What has requests answered; `pool.Pool`."""

    def submit(self, lane: str, request: dict, done: Callable[[Answer], None], order: int = 0) -> None:
        """Asks for something; see `Pool.submit`."""

    def step(self) -> None:
        """Waits until something happens, and calls what is to be called."""


@dataclass
class Found:
    """What the search found for a call.

    Attributes:
        call: which.
        entry: for the table; None where not even the heuristic's tiles ran.
        candidates: how many were tried.
        failed: reasons of those that failed, by what they were.
        error: why there is no entry.
        timed: milliseconds of the candidates of the first race.
    """

    call: Call
    entry: Entry | None = None
    candidates: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    timed: list[tuple[Tiles, float]] = field(default_factory=list)


class Search:
    """Tunes calls."""

    def __init__(
        self,
        device: Device,
        runner: Runner,
        journals: Mapping[Bucket, Journal],
        *,
        margin: float = MARGIN,
        step: Callable[[str, int], None] = lambda what, more: None,
    ) -> None:
        """Prepares a search.

        Args:
            device: what the calls run on.
            runner: what has requests answered.
            journals: of what was run already, for the bucket of every call.
            margin: as `MARGIN`.
            step: called with (what, number of requests that are new) as requests come up, and with ("", -1) for each
                that is answered.
        """
        self._device, self._runner, self._journals = device, runner, journals
        self._margin, self._step = margin, step
        # Answers by key, of everything that was asked; and who waits for those that are on their way.
        self._answers: dict[str, Answer] = {}
        self._awaited: dict[str, list[Callable[[], None]]] = {}
        # By `Call.gemms`: the search that is under way (None), or what it found.
        self._twins: dict[tuple, Found | None] = {}

    def run(self, calls: Sequence[Call], found: Callable[[Found], None]) -> None:
        """Tunes calls, and says of each what was found as soon as it is."""
        waiting = deque(enumerate(calls))
        self._active = 0
        while waiting or self._active:
            while waiting and self._active < _TOGETHER and (place := self._next(waiting)) is not None:
                order, call = waiting[place]
                del waiting[place]
                self._active += 1
                twin = self._twins.setdefault(call.gemms)
                self._resume(order, self._tune(call, twin), None, found)
            if self._active:
                self._runner.step()

    def _next(self, waiting: Sequence[tuple[int, Call]]) -> int | None:
        """The first call that need not wait for one with equal GEMMs to be found."""
        for place, (_, call) in enumerate(waiting):
            if call.gemms not in self._twins or self._twins[call.gemms] is not None:
                return place
        return None

    def _resume(self, order: int, steps: Steps, answers: list[Answer] | None, found: Callable[[Found], None]) -> None:
        """Goes on with a call's search until it has to wait."""
        while True:
            try:
                bucket, lane, requests = steps.send(answers)
            except StopIteration as stop:
                self._active -= 1
                if self._twins.get(stop.value.call.gemms) is None:
                    self._twins[stop.value.call.gemms] = stop.value
                found(stop.value)
                return
            journal = self._journals[bucket]
            for key in requests:
                if key not in self._answers and (value := journal.get(key)) is not None:
                    self._answers[key] = Answer(**value)
            missing = {key: request for key, request in requests.items() if key not in self._answers}
            if missing:
                self._ask(
                    order, lane, dict(missing), self._when_all_came(order, steps, requests, missing, found, journal)
                )
                return
            answers = [self._answers[key] for key in requests]

    def _when_all_came(self, order: int, steps: Steps, requests: dict, missing: dict, found: Callable[[Found], None],
                       journal: Journal) -> Callable[[str], None]:  # fmt: skip
        def came(key: str) -> None:
            answer = self._answers[key]
            # What fails without a candidate at work (memory that others have, say) may succeed the next time.
            if answer.error is None or answer.culprit is not None:
                journal.put(key, {**vars(answer), "failed": dict(answer.failed)})
            del missing[key]
            if not missing:
                self._resume(order, steps, [self._answers[key] for key in requests], found)

        return came

    def _ask(self, order: int, lane: str, requests: dict[str, dict], came: Callable[[str], None]) -> None:
        new = {key: request for key, request in requests.items() if key not in self._awaited}
        for key in requests:
            self._awaited.setdefault(key, []).append(came)
        if new:
            self._step(next(iter(new.values()))["op"], len(new))
        for key, request in new.items():
            self._runner.submit(lane, request, lambda answer, key=key: self._answered(key, answer), order)

    def _answered(self, key: str, answer: Answer) -> None:
        self._answers[key] = answer
        self._step("", -1)
        for came in self._awaited.pop(key):
            came(key)

    def _tune(self, call: Call, twin: Found | None) -> Steps:
        """The search of one call. One with equal GEMMs that was tuned leaves two candidates: its best, and our own."""
        state, problem = Found(call), call.problem()
        wave = first_wave(problem, self._device, call.path)
        own = wave[0]
        if twin is not None and twin.entry is not None:
            best = [own] if twin.entry.tiles is None else [own, twin.entry.tiles]
            wave = fitting(best, problem, self._device, call.path)
        good = yield from self._compile(state, wave)
        if own not in good:
            state.error = f"the heuristic's own tiles failed: {state.failed.get(_name(own))}"
            return state
        if len(wave) > 2:
            state.timed = yield from self._race(state, good, _FIRST_ROUNDS)
            times = dict(state.timed)
            order = [tiles for tiles, _ in state.timed]
            new = []
            if own in times and state.timed[0][1] < times[own] * (1 - _PROMISING):
                second = second_wave(problem, self._device, call.path, order, wave)
                new = yield from self._compile(state, second)
            good = [own, *(tiles for tiles in (*order[:_STAYING], *new) if tiles != own)]
        if state.error is None:
            yield from self._decide(state, own, good)
        return state

    def _decide(self, state: Found, own: Tiles, best: list[Tiles]) -> Steps:
        """Sets the entry: the winner of a race of the best, if it is right and beats the heuristic again."""
        times = dict((yield from self._race(state, best, _BEST_ROUNDS)))
        if own not in times:
            state.error = state.error or f"the heuristic's own tiles failed: {state.failed.get(_name(own))}"
            return
        tokens, own_ms = state.call.tokens, times[own]
        enough = 1 - self._margin
        for tiles in [tiles for tiles, ms in times.items() if ms < own_ms * enough][:_FINALISTS]:
            answer = yield from self._on_device(state, _request("verify", state.call, [tiles]))
            if answer.error is not None:
                state.failed[_name(tiles)] = f"wrong result: {answer.error}"
                continue
            final = dict((yield from self._race(state, [own, tiles], _FINAL_ROUNDS)))
            own_ms = final.get(own, own_ms)
            if tiles in final and final[tiles] < own_ms * enough:
                state.entry = Entry(tokens, tiles, final[tiles], own_ms)
                return
        state.entry = Entry(tokens, None, own_ms, own_ms)

    def _compile(self, state: Found, wave: list[Tiles]) -> Generator[Requests, list[Answer], list[Tiles]]:
        """Has all kernels of a wave compiled, each once; returns the candidates without one that failed."""
        parts = [(tiles, part, part_key(state.call, tiles, part)) for tiles in wave for part in PARTS]
        requests: dict[str, dict] = {}
        for tiles, part, key in parts:
            requests.setdefault(key, {**_request("compile", state.call, [tiles]), "part": part})
        answers = yield state.call.bucket, COMPILE, requests
        errors = {key: answer.error for key, answer in zip(requests, answers, strict=True)}
        state.candidates += len(wave)
        state.failed |= {_name(tiles): errors[key] for tiles, _, key in parts if errors[key] is not None}
        return [tiles for tiles in wave if _name(tiles) not in state.failed]

    def _race(self, state: Found, tiles: list[Tiles], rounds: int
              ) -> Generator[Requests, list[Answer], list[tuple[Tiles, float]]]:  # fmt: skip
        """(tiles, milliseconds), the fastest first. A candidate that takes the process with it is left out."""
        while tiles:
            answer = yield from self._on_device(state, {**_request("race", state.call, tiles), "rounds": rounds})
            for number, error in answer.failed.items():
                state.failed[_name(tiles[int(number)])] = error
            if answer.error is None:
                times = zip(tiles, answer.result, strict=True)
                return sorted(((t, ms) for t, ms in times if ms is not None), key=lambda pair: pair[1])
            if answer.culprit is None:
                state.error = answer.error
                return []
            state.failed[_name(tiles[answer.culprit])] = answer.error
            tiles = [t for t in tiles if _name(t) not in state.failed]
        return []

    @staticmethod
    def _on_device(state: Found, request: dict) -> Generator[Requests, list[Answer], Answer]:
        (answer,) = yield state.call.bucket, DEVICE, {json.dumps(request, sort_keys=True): request}
        return answer


def _request(op: str, call: Call, tiles: list[Tiles]) -> dict:
    return {"op": op, "call": call.to_json(), "candidates": [tiles_to_json(t) for t in tiles]}


def _name(tiles: Tiles) -> str:
    return json.dumps(tiles_to_json(tiles))
