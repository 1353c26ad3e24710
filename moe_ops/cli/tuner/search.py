"""The search: try, time, combine the best, time again, verify; keep only what beats the heuristic by more than noise.

Nothing here touches a device: a `Runner` does, and in tests a fake one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moe_ops.cli.tuner.calls import Call, tiles_to_json
from moe_ops.cli.tuner.candidates import first_wave, second_wave
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Answer
from moe_ops.devices import Device
from moe_ops.tuning.table import Entry, Tiles

# A winner is this much faster than the heuristic's tiles in rounds of its own, or those are kept.
MARGIN = 0.02
# Samples of each candidate in the first race, in that of the best, and in the final between two.
_FIRST_ROUNDS, _BEST_ROUNDS, _FINAL_ROUNDS = 3, 7, 15
# Candidates of the first race that stay, and finalists that are verified before the search gives up.
_STAYING, _FINALISTS = 5, 3
# Calls whose trials run together: enough to keep processes busy, and few enough that a table grows as they end.
_TOGETHER = 2


class Runner(Protocol):
    """What has requests answered; `pool.Pool` by `PoolRunner`."""

    def run(
        self, requests: Sequence[dict], *, alone: bool, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Answers in order; `alone` has them done one at a time, with nothing beside them on the device."""


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
    """Tunes the calls of one bucket."""

    def __init__(
        self,
        device: Device,
        runner: Runner,
        journal: Journal,
        *,
        margin: float = MARGIN,
        step: Callable[[str, int], None] = lambda what, more: None,
    ) -> None:
        """Prepares a search.

        Args:
            device: what the calls run on.
            runner: what runs them.
            journal: of what was run already.
            margin: as `MARGIN`.
            step: called with (what, number of requests that are new) as requests come up, and with ("", -1) for each
                that is answered.
        """
        self._device, self._runner, self._journal = device, runner, journal
        self._margin, self._step = margin, step

    def run(self, calls: Sequence[Call], found: Callable[[Found], None]) -> None:
        """Tunes calls, and says of each what was found as soon as it is.

        The trials of some calls run together, since compiling keeps many processes busy; races run one at a time.
        """
        for first in range(0, len(calls), _TOGETHER):
            self._run(calls[first : first + _TOGETHER], found)

    def _run(self, calls: Sequence[Call], found: Callable[[Found], None]) -> None:
        states = [Found(call) for call in calls]
        waves = [first_wave(state.call.problem(), self._device, state.call.path) for state in states]
        self._try(states, waves)
        ranked = []
        for state, wave in zip(states, waves, strict=True):
            good = [tiles for tiles in wave if _name(tiles) not in state.failed]
            if wave[0] not in good:
                state.error = f"the heuristic's own tiles failed: {state.failed.get(_name(wave[0]))}"
                good = []
            state.timed = self._race(state, good, _FIRST_ROUNDS)
            ranked.append([tiles for tiles, _ in state.timed])
        seconds = [
            second_wave(state.call.problem(), self._device, state.call.path, order, wave)
            for state, order, wave in zip(states, ranked, waves, strict=True)
        ]
        self._try(states, seconds)
        for state, wave, order, second in zip(states, waves, ranked, seconds, strict=True):
            if state.error is None:
                new = [tiles for tiles in second if _name(tiles) not in state.failed]
                self._decide(state, wave[0], [*order[:_STAYING], *new])
            found(state)

    def _decide(self, state: Found, own: Tiles, best: list[Tiles]) -> None:
        """Sets the entry: the winner of a race of the best, if it is right and beats the heuristic again."""
        times = dict(self._race(state, [own, *(tiles for tiles in best if tiles != own)], _BEST_ROUNDS))
        if own not in times:
            state.error = f"the heuristic's own tiles failed: {state.failed.get(_name(own))}"
            return
        tokens, own_ms = state.call.tokens, times[own]
        enough = 1 - self._margin
        for tiles in [tiles for tiles, ms in times.items() if ms < own_ms * enough][:_FINALISTS]:
            answer = self._ask([_request("verify", state.call, [tiles])])[0]
            if answer.error is not None:
                state.failed[_name(tiles)] = f"wrong result: {answer.error}"
                continue
            final = dict(self._race(state, [own, tiles], _FINAL_ROUNDS))
            own_ms = final.get(own, own_ms)
            if tiles in final and final[tiles] < own_ms * enough:
                state.entry = Entry(tokens, tiles, final[tiles], own_ms)
                return
        state.entry = Entry(tokens, None, own_ms, own_ms)

    def _try(self, states: list[Found], waves: list[list[Tiles]]) -> None:
        """Runs every candidate of a wave once, and notes those that fail."""
        asked = [
            (state, tiles, _request("trial", state.call, [tiles]))
            for state, wave in zip(states, waves, strict=True)
            for tiles in wave
        ]
        answers = self._ask([request for _, _, request in asked], alone=False)
        for (state, tiles, _), answer in zip(asked, answers, strict=True):
            state.candidates += 1
            if answer.error is not None:
                state.failed[_name(tiles)] = answer.error

    def _race(self, state: Found, tiles: list[Tiles], rounds: int) -> list[tuple[Tiles, float]]:
        """(tiles, milliseconds), the fastest first. A candidate that takes the process with it is left out."""
        while tiles:
            answer = self._ask([{**_request("race", state.call, tiles), "rounds": rounds}])[0]
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

    def _ask(self, requests: list[dict], *, alone: bool = True) -> list[Answer]:
        """Answers out of the journal where it has them, otherwise of the runner."""
        keys = [json.dumps(request, sort_keys=True) for request in requests]
        known = [self._journal.get(key) for key in keys]
        answers = [value and _answer_from_json(value) for value in known]
        missing = [number for number, value in enumerate(known) if value is None]
        self._step(requests[0]["op"] if requests else "", len(missing))

        def keep(number: int, answer: Answer) -> None:
            answers[missing[number]] = answer
            # What fails without a candidate at work (memory that others have, say) may succeed the next time.
            if answer.error is None or answer.culprit is not None:
                self._journal.put(keys[missing[number]], _answer_to_json(answer))
            self._step("", -1)

        self._runner.run([requests[number] for number in missing], alone=alone, done=keep)
        return answers


def _request(op: str, call: Call, tiles: list[Tiles]) -> dict:
    return {"op": op, "call": call.to_json(), "candidates": [tiles_to_json(t) for t in tiles]}


def _name(tiles: Tiles) -> str:
    return json.dumps(tiles_to_json(tiles))


def _answer_to_json(answer: Answer) -> dict:
    return {"result": answer.result, "error": answer.error, "culprit": answer.culprit, "failed": dict(answer.failed)}


def _answer_from_json(value: dict) -> Answer:
    return Answer(**value)
