"""Every test in this folder needs a CUDA device: a limit on its time, and a look at the device after it.

A kernel that hangs, or reads where it must not, takes the CUDA context of its process with it, and every test after it
in that process. A process for each test would cost a CUDA start (some seconds) for each of hundreds. So:

* A test that exceeds its time ends its process, with the stacks of its threads (pytest-timeout's method "thread": the
  default, a signal, waits for the call into CUDA to return, which it never does). Run with `-n 1`, pytest-xdist then
  reports that test and goes on in a new process.
* A test that broke the device fails itself, and the session stops there.
* `own_process(NAME="value", ...)` marks a test that may do either, or that needs an environment or a state of CUDA of
  its own: it runs in a process group of its own, which is killed when it hangs.
"""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from tests.gpu.repeats import CASES

_SECONDS = 120
# What a process of its own takes beside its test, and what its end may take.
_SECONDS_TO_START, _SECONDS_TO_DIE = 60, 30
_CHILD = "MOE_OPS_TEST_CHILD"
_LIMIT = pytest.StashKey[int]()
_SHOWN = 4000


def pytest_configure(config):
    config.addinivalue_line("markers", "own_process(**environment): runs in a process group of its own")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        marker = item.get_closest_marker("timeout")
        limit = item.stash[_LIMIT] = marker.args[0] if marker else _SECONDS
        if _is_for_child(item):
            limit += _SECONDS_TO_START + 2 * _SECONDS_TO_DIE
        item.add_marker(pytest.mark.timeout(limit, method="thread"), append=False)
        item.add_marker(pytest.mark.gpu)


def _is_for_child(item) -> bool:
    return item.get_closest_marker("own_process") is not None and _CHILD not in os.environ


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not _is_for_child(pyfuncitem):
        return None
    status, output = _run_in_child(pyfuncitem, pyfuncitem.get_closest_marker("own_process").kwargs)
    print(output)
    if status != 0:
        pytest.fail(f"its process {'hung' if status is None else f'ended with status {status}'}", pytrace=False)
    return True


def _run_in_child(item, environment: dict[str, str]) -> tuple[int | None, str]:
    """Runs one test in a process group of its own: (its exit status, None if it was killed; its last output)."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", item.nodeid]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=item.config.rootpath, env={**os.environ, **environment, _CHILD: "1"}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(item.stash[_LIMIT] + _SECONDS_TO_START)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Also what it started itself and left behind; the group is its own.
            _kill_group(process)
        log.seek(0)
        return status, log.read()[-_SHOWN:]


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_SECONDS_TO_DIE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass  # nobody left, or a kernel that not even the driver can end


def _probe() -> None:
    """A small sum on the current device and on others that hold memory of ours: raises where CUDA is broken."""
    for index in range(torch.cuda.device_count()):
        if index == torch.cuda.current_device() or torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)
            total = torch.arange(64, device=f"cuda:{index}").sum().item()
            if total != 2016:
                raise RuntimeError(f"cuda:{index} computes {total} for the sum of 0 to 63")
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _device_survives(request):
    yield
    if _is_for_child(request.node):
        return
    try:
        _probe()
    except RuntimeError as error:
        # Nothing that runs in this process from here on would say anything about the package.
        request.session.shouldstop = f"{request.node.nodeid} broke the device: {str(error).splitlines()[0]}"
        pytest.fail(f"the device is broken after this test: {error}", pytrace=False)


@pytest.fixture(params=CASES)
def case(request):
    """Every kernel variant and path by turns, as `tests.gpu.repeats` forces them; the tiles are Hopper's."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the tiles are Hopper's")
    return CASES[request.param]
