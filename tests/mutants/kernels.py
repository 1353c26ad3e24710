"""Mutated copies of the package, judged by checks in processes of their own.

A mutation is applied to a copy of the package, never to the tree. `python -m tests.mutants.table` records who kills it.
"""

import contextlib
import functools
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150
# On a GPU hangs are common, and the checks short: most of their time goes into compilation.
GPU_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """What the checks said of a copy.

    Attributes:
        status: exit status of the process, negative for a signal; None if it hung and was ended.
        check: the last check that began.
        output: the end of stdout and stderr.
    """

    status: int | None
    check: str
    output: str

    @property
    def killed(self) -> bool:
        return self.status != 0

    def __str__(self) -> str:
        how = {None: "hangs", 0: "lives"}.get(self.status, "crashes" if (self.status or 0) < 0 else "fails")
        return f"{self.check}: {how}"


def copy_package(folder: Path, mutation: Mutation | None = None) -> Path:
    """folder/moe_ops, mutated; returns it."""
    ignore = shutil.ignore_patterns("__pycache__")
    package = Path(shutil.copytree(ROOT / "moe_ops", folder / "moe_ops", ignore=ignore))
    if mutation is not None:
        mutation.apply(package)
    return package


class Nursery:
    """A process that forks one for each copy; see `nursery`. One request at a time."""

    def __init__(self, *, interpret: bool = True) -> None:
        self.seconds = SECONDS if interpret else GPU_SECONDS
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
        command = [sys.executable, "-m", "tests.mutants.nursery"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def judge(self, folder: Path, mutation: Mutation | None, first: str) -> Outcome:
        """The outcome of a fresh copy in folder, with the mutation or without one."""
        folder.mkdir()
        copy_package(folder, mutation)
        self.process.stdin.write(f"{folder}\t{first}\t{self.seconds}\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline().strip()
        begun = (folder / "log.txt").read_text().splitlines()
        errors = (folder / "errors.txt").read_text()[-3000:]
        return Outcome(None if reply == "None" else int(reply), begun[-1] if begun else "", errors)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@contextlib.contextmanager
def judges(count: int, *, interpret: bool = True) -> Iterator[Callable[[Path, Mutation | None, str], Future]]:
    """`Nursery.judge` for `count` copies at a time; what was not begun at the end of the block is dropped."""
    nurseries = queue.SimpleQueue()
    for _ in range(count):
        nurseries.put(Nursery(interpret=interpret))

    def judge(*request) -> Outcome:
        nursery = nurseries.get()
        try:
            return nursery.judge(*request)
        finally:
            nurseries.put(nursery)

    try:
        with ThreadPoolExecutor(count) as pool:
            yield functools.partial(pool.submit, judge)
            pool.shutdown(cancel_futures=True)
    finally:
        for _ in range(count):
            nurseries.get().close()
