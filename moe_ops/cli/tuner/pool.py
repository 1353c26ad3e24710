"""Worker processes that may crash or hang: each is told what to do, watched, killed when it is late, and replaced."""

import json
import multiprocessing
import multiprocessing.connection
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
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
        self.job: tuple[int, dict] | None = None
        self.last_call: object = None
        self.culprit: int | None = None
        self.failed: dict[int, str] = {}
        self.deadline = time.monotonic() + _START_SECONDS

    def begin(self, number: int, request: dict) -> None:
        self.job, self.culprit, self.failed = (number, request), None, {}
        self.last_call = request.get("call")
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


class Pool:
    """Workers for requests; an answer for each, whatever becomes of the workers.

    A worker speaks JSON: {"event": "ready", ...} once; then for each request {"event": "begin", "index": n} before
    each candidate, {"event": "skip", "index": n, "error": text} after one that failed alone, and at last
    {"event": "done", "result": ...} or {"event": "failed", "error": text, "broken": whether the process is}.
    """

    def __init__(self, target: Callable, arguments: tuple = (), *, limit: float) -> None:
        """Starts nothing yet.

        Args:
            target: the worker's function, importable: (connection, *arguments).
            arguments: passed on.
            limit: seconds that a candidate may take.
        """
        self._context = multiprocessing.get_context("spawn")
        self._target, self._arguments, self._limit = target, arguments, limit
        self._workers: list[_Worker] = []
        # Workers in a row that ended before they had begun with any candidate.
        self._fruitless = 0
        self._last_end = ""

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.shrink(0)

    def hello(self) -> dict:
        """What the first worker says of itself.

        Raises:
            PoolError: none starts.
        """
        if not self._workers:
            self._start()
        while self._workers[0].hello is None:
            self._wait({})
            if not self._workers:
                self._start()
        return self._workers[0].hello

    def shrink(self, count: int) -> None:
        """Ends all but `count` workers."""
        while len(self._workers) > count:
            self._workers.pop().end()

    def run(
        self, requests: Iterable[dict], workers: int, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Has requests answered, several at a time.

        Args:
            requests: JSON objects; of those with equal "call", a worker that prepared it gets as many as it can.
            workers: processes at most.
            done: called with (number of the request, answer) as they come.

        Returns:
            The answers, in order.

        Raises:
            PoolError: no worker survives its start, or the preparation of a call.
        """
        waiting = deque(enumerate(requests))
        answers: dict[int, Answer] = {}
        total = len(waiting)
        while len(answers) < total:
            while waiting and len(self._workers) < min(workers, total - len(answers)):
                self._start()
            for worker in self._workers[:workers]:
                if worker.hello is not None and worker.job is None and waiting:
                    self._give(worker, waiting)
            fresh: dict[int, Answer] = {}
            self._wait(fresh)
            for number, answer in fresh.items():
                answers[number] = answer
                if done is not None:
                    done(number, answer)
        return [answers[number] for number in range(total)]

    def _start(self) -> None:
        if self._fruitless >= _MAX_FRUITLESS:
            raise PoolError(f"{self._fruitless} workers in a row ended before they had done anything: {self._last_end}")
        self._workers.append(_Worker(self._context, self._target, self._arguments))

    @staticmethod
    def _give(worker: _Worker, waiting: deque) -> None:
        place = next((i for i, (_, request) in enumerate(waiting) if request.get("call") == worker.last_call), 0)
        number, request = waiting[place]
        del waiting[place]
        worker.begin(number, request)

    def _wait(self, answers: dict[int, Answer]) -> None:
        """Waits for the next event of any worker, or for the first deadline, and acts on it."""
        busy = [worker for worker in self._workers if worker.job is not None or worker.hello is None]
        now = time.monotonic()
        timeout = max(0.0, min(worker.deadline for worker in busy) - now) if busy else 0.0
        ready = set(multiprocessing.connection.wait([worker.connection for worker in busy], timeout))
        for worker in busy:
            if worker.connection in ready:
                try:
                    event = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError, ValueError):
                    self._lost(worker, None, answers)
                else:
                    self._heard(worker, event, answers)
            elif time.monotonic() >= worker.deadline:
                self._lost(worker, "it hung", answers)

    def _heard(self, worker: _Worker, event: dict, answers: dict[int, Answer]) -> None:
        kind = event["event"]
        if kind == "ready":
            worker.hello = event
        elif kind == "begin":
            worker.culprit = event["index"]
            worker.deadline = time.monotonic() + self._limit
            worker.began, self._fruitless = True, 0
        elif kind == "skip":
            worker.failed[event["index"]] = event["error"]
        elif kind == "done":
            self._answer(worker, Answer(event["result"], failed=worker.failed), answers)
        else:
            self._answer(worker, Answer(error=event["error"], culprit=worker.culprit, failed=worker.failed), answers)
            if event.get("broken"):
                self._gone(worker)

    def _lost(self, worker: _Worker, why: str | None, answers: dict[int, Answer]) -> None:
        how = self._gone(worker)
        if worker.job is not None:
            error = f"{why} for {self._limit:g} s" if why and worker.culprit is not None else (why or how)
            self._answer(worker, Answer(error=error, culprit=worker.culprit, failed=worker.failed), answers)

    def _gone(self, worker: _Worker) -> str:
        """Takes a worker off the list; returns how it ended."""
        self._workers.remove(worker)
        self._fruitless += not worker.began
        self._last_end = worker.end()
        return self._last_end

    @staticmethod
    def _answer(worker: _Worker, answer: Answer, answers: dict[int, Answer]) -> None:
        answers[worker.job[0]] = answer
        worker.job = None
