"""MOE_OPS_REPEATS calls of every variant give the same bits beside other work; a process each, see repeats.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.repeats import ALL_CASES, REPEATS

ROOT = Path(__file__).resolve().parents[2]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
# From the start of a process. A thousand calls each take about 20 s together, most of it imports and compilation.
_SECONDS = 120 + REPEATS * 60 // 1000
_SECONDS_TO_DIE = 30

# The children are ended before the process that watches them.
pytestmark = pytest.mark.timeout(_SECONDS + 2 * _SECONDS_TO_DIE)


class Child:
    """The process of a case, its output in a file."""

    def __init__(self, name: str, log: Path) -> None:
        self.log = log
        self._deadline = time.monotonic() + _SECONDS
        with log.open("w") as output:
            command = [sys.executable, "-m", "tests.gpu.repeats", name]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def finish(self) -> str | None:
        """Waits for the end; what went wrong, None if nothing did."""
        try:
            status = self.process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"hangs, or is far too slow; ended after {_SECONDS} s{self.kill()}\n{self._tail()}"
        return f"exit status {status}\n{self._tail()}" if status else None

    def kill(self) -> str:
        """Ends the process, and with it its kernels."""
        self.process.kill()
        try:
            self.process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            return f", but is still there {_SECONDS_TO_DIE} s later"
        return ""

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def start(request, tmp_path_factory):
    """name -> the process of a case.

    They start together: each is busy with itself most of its time. A worker of pytest-xdist, beside which others have
    cases of their own, starts only what it is asked for.
    """
    items = [item for item in request.session.items if getattr(item, "function", None) is test_repeats]
    folder = tmp_path_factory.mktemp("repeats")
    children = {}

    def of(name):
        if name not in children:
            children[name] = Child(name, folder / f"{name}.log")
        return children[name]

    if "PYTEST_XDIST_WORKER" not in os.environ:
        for item in items:
            of(item.callspec.params["name"])
    yield of
    for child in children.values():
        child.kill()


@pytest.mark.skipif(not HOPPER, reason="the tiles are Hopper's")
@pytest.mark.parametrize("name", ALL_CASES)
def test_repeats(name, start):
    problem = start(name).finish()
    assert problem is None, f"variant {name}: {problem}"
