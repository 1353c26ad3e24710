"""Jobs that get ready side by side, each in a process of its own, and are timed one after the other."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
# (job, turn) -> result; what it does before it calls `turn` is done beside the other jobs, what it does after it alone.
Work = Callable[[Job, Callable[[], None]], Result]


class JobError(RuntimeError):
    """A job failed; what it said is on stderr."""


def run_in_turn(work: Work, jobs: Sequence[Job], together: int) -> Iterator[tuple[Job, Result]]:
    """Does jobs, and gives each result as soon as it is there.

    Args:
        work: what to do, importable by name; it, jobs and results can be pickled.
        jobs: in the order of their turns.
        together: jobs that get ready side by side, and take their turns when all of them are; with 1, or one job, all
            is done in this process.

    Raises:
        JobError: a process failed.
    """
    if together == 1 or len(jobs) == 1:
        for job in jobs:
            yield job, work(job, lambda: None)
        return
    for first in range(0, len(jobs), together):
        yield from _group(work, jobs[first : first + together])


def _group(work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
    context = multiprocessing.get_context("spawn")
    # Each has compilers of its own for what Inductor generates.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(jobs))))
    processes, pipes = [], []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(work, job, theirs)))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        for job, pipe in zip(jobs, pipes, strict=True):
            _hear(pipe, "ready", job)
        for job, pipe, process in zip(jobs, pipes, processes, strict=True):
            pipe.send("go")
            yield job, _hear(pipe, "done", job)
            process.join()  # what ends beside the next one would be in its times
    finally:
        for process in processes:
            process.kill()
            process.join()


def _hear(pipe, expected: str, job: Job) -> Result:
    try:
        said, value = pipe.recv()
    except EOFError:
        said, value = "gone", None
    if said != expected:
        raise JobError(f"{job} failed before it was {expected}")
    return value


def _serve(work: Work, job: Job, pipe) -> None:
    def turn() -> None:
        pipe.send(("ready", None))
        pipe.recv()

    try:
        pipe.send(("done", work(job, turn)))
    except (EOFError, BrokenPipeError):  # the other end is gone: nobody waits for the result
        pass
    except BaseException:
        traceback.print_exc()
        pipe.send(("failed", None))
        raise SystemExit(1) from None
