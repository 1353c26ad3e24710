"""Worker processes that may crash or hang: each is told what to do, watched, killed when it is late, and replaced."""

import heapq
import itertools
import json
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# From the start of a process to its first words, and to the end of preparing a call: imports, weights.
_START_SECONDS = 300
_END_SECONDS = 15
_MAX_FRUITLESS = 3


class PoolError(RuntimeError):
    """No worker can be started, or none survives the preparation of a call."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        result: of a request that ended; None otherwise.
        error: why it did not.
        culprit: number of the candidate that was at work when it did not; None where none was.
        failed: reasons by number of candidates that failed while others went on.
    """

    result: object = None
    error: str | None = None
    culprit: int | None = None
    failed: Mapping[int, str] = field(default_factory=dict)


Done = Callable[[Answer], None]


class _Worker:
    """One process, and what it is doing."""

    def __init__(self, context, target: Callable, arguments: tuple) -> None:
        ours, theirs = context.Pipe()
        self.connection = ours
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # ours to read from: only the child's end may keep it open
        self.hello: dict | None = None
        self.began = False
        self.done: Done | None = None
        self.culprit: int | None = None
        self.failed: dict[int, str] = {}
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def busy(self) -> bool:
        """Whether something is to be heard of it."""
        return self.hello is None or self.done is not None

    def begin(self, request: dict, done: Done) -> None:
        self.done, self.culprit, self.failed = done, None, {}
        self.deadline = time.monotonic() + _START_SECONDS
        self.connection.send_bytes(json.dumps(request).encode())

    def end(self) -> str:
        """Kills the process; returns how it had ended, if it had."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        self.connection.close()
        return "its process could not be ended" if code is None else f"its process ended with status {code}"


class Lane:
    """Workers of one kind, and the requests that wait for one of them."""

    def __init__(self, context, target: Callable, arguments: tuple, workers: int) -> None:
        self._context, self._target, self._arguments, self._most = context, target, arguments, workers
        self.workers: list[_Worker] = []
        self._waiting: list[tuple[int, int, dict, Done]] = []
        self._numbers = itertools.count()
        # Workers in a row that ended before they had begun with any candidate.
        self._fruitless = 0
        self._last_end = ""

    def put(self, order: int, request: dict, done: Done) -> None:
        heapq.heappush(self._waiting, (order, next(self._numbers), request, done))

    def start(self) -> None:
        if self._fruitless >= _MAX_FRUITLESS:
            raise PoolError(f"{self._fruitless} workers in a row ended before they had done anything: {self._last_end}")
        self.workers.append(_Worker(self._context, self._target, self._arguments))

    def give(self) -> None:
        """Hands requests to workers that have nothing to do, and starts workers for the others."""
        for worker in self.workers:
            if self._waiting and not worker.busy:
                _, _, request, done = heapq.heappop(self._waiting)
                worker.begin(request, done)
        starting = sum(worker.hello is None for worker in self.workers)
        for _ in range(min(len(self._waiting) - starting, self._most - len(self.workers))):
            self.start()

    def heard(self, worker: _Worker, event: dict) -> None:
        kind = event["event"]
        if kind == "ready":
            worker.hello = event
        elif kind == "begin":
            worker.culprit = event["index"]
            worker.began, self._fruitless = True, 0
        elif kind == "skip":
            worker.failed[event["index"]] = event["error"]
        elif kind == "done":
            self._answer(worker, Answer(event["result"], failed=worker.failed))
        else:
            if event.get("broken"):
                self.gone(worker)
            self._answer(worker, Answer(error=event["error"], culprit=worker.culprit, failed=worker.failed))

    def lost(self, worker: _Worker, why: str | None, limit: float) -> None:
        how = self.gone(worker)
        if worker.done is not None:
            error = f"{why} for {limit:g} s" if why and worker.culprit is not None else (why or how)
            self._answer(worker, Answer(error=error, culprit=worker.culprit, failed=worker.failed))

    def gone(self, worker: _Worker) -> str:
        """Takes a worker off the list; returns how it ended."""
        self.workers.remove(worker)
        self._fruitless += not worker.began
        self._last_end = worker.end()
        return self._last_end

    @staticmethod
    def _answer(worker: _Worker, answer: Answer) -> None:
        done, worker.done = worker.done, None
        done(answer)


class Pool:
    """Workers in lanes, requests for each lane, and an answer for every request, whatever becomes of the workers.

    A worker speaks JSON: {"event": "ready", ...} once; then for each request {"event": "begin", "index": n} before
    each candidate, {"event": "skip", "index": n, "error": text} after one that failed alone, and at last
    {"event": "done", "result": ...} or {"event": "failed", "error": text, "broken": whether the process is}.
    """

    def __init__(self, *, limit: float) -> None:
        """Starts nothing yet.

        Args:
            limit: seconds that a candidate may take.
        """
        self._context = multiprocessing.get_context("spawn")
        self._limit = limit
        self._lanes: dict[str, Lane] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def open(self, lane: str, target: Callable, arguments: tuple = (), workers: int = 1) -> None:
        """Opens a lane.

        Args:
            lane: its name.
            target: the workers' function, importable: (connection, *arguments).
            arguments: passed on.
            workers: processes at most.
        """
        self._lanes[lane] = Lane(self._context, target, arguments, workers)

    def hello(self, lane: str) -> dict:
        """What the first worker of a lane says of itself.

        Raises:
            PoolError: none starts.
        """
        found = self._lanes[lane]
        while True:
            if not found.workers:
                found.start()
            if found.workers[0].hello is not None:
                return found.workers[0].hello
            self._wait()

    def submit(self, lane: str, request: dict, done: Done, order: int = 0) -> None:
        """Asks for something.

        Args:
            lane: whose workers are to do it.
            request: a JSON object.
            done: called with the answer, by a later `step`.
            order: requests of a lower one are done first, those of equal ones as they come.
        """
        self._lanes[lane].put(order, request, done)

    def step(self) -> None:
        """Hands out what waits, and waits until a worker says something or is late.

        Raises:
            PoolError: no worker of a lane survives its start, or the preparation of a call.
        """
        for lane in self._lanes.values():
            lane.give()
        self._wait()

    def end(self) -> None:
        """Ends all workers."""
        for lane in self._lanes.values():
            while lane.workers:
                lane.workers.pop().end()

    def _wait(self) -> None:
        """Waits for the next event of any worker, or for the first deadline, and acts on it."""
        busy = [(lane, worker) for lane in self._lanes.values() for worker in lane.workers if worker.busy]
        now = time.monotonic()
        timeout = max(0.0, min(worker.deadline for _, worker in busy) - now) if busy else 0.0
        ready = set(multiprocessing.connection.wait([worker.connection for _, worker in busy], timeout))
        for lane, worker in busy:
            if worker.connection in ready:
                try:
                    event = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError, ValueError):
                    lane.lost(worker, None, self._limit)
                else:
                    if event["event"] == "begin":
                        worker.deadline = time.monotonic() + self._limit
                    lane.heard(worker, event)
            elif time.monotonic() >= worker.deadline:
                lane.lost(worker, "it hung", self._limit)
