"""Forks a process for each copy of the package to check: `python -m tests.mutants.nursery` with requests on stdin.

A request is a line "folder<TAB>check to begin with<TAB>seconds", the reply one line: the process's exit status, or
"None" for one that was ended. torch and Triton are imported once, before; the package only in the forked process.
"""

import os
import signal
import sys
import time
import traceback

import torch
import torch._inductor.config  # what `poisoned_memory` would import in every process
import triton.language  # noqa: F401

_TICK = 0.02


def check(folder: str, first: str) -> int:
    """Checks the copy in this process; 1 if it fails."""
    with open("log.txt", "w") as log, open("errors.txt", "w") as errors:
        os.dup2(log.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
    sys.path.insert(0, folder)
    try:
        from tests.mutants.checks import main

        main(first)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int, seconds: float) -> int | None:
    """Exit status, negative for a signal; None if the process did not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_TICK)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Serves requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, first, seconds = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            status = check(folder, first)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(wait(pid, float(seconds)), flush=True)


if __name__ == "__main__":
    main()
