"""The tests that need a GPU, as many as fit into some time: python benchmarks/proof.py [--seconds 240] [--json FILE]

Files go first that say most: numerics of every path and format, determinism, graphs; then drawn calls and repeats,
fewer than `make test` has. What the time did not reach is told apart from what passed. Without a GPU (`--device cpu`)
some tests of the CPU path run. Exit status 1 if a test fails or none passes.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import head, write

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "cuda": [
        *(f"tests/gpu/test_{name}.py" for name in ("paths", "quantized", "topk", "determinism", "graphs", "memory")),
        *(f"tests/gpu/test_{name}.py" for name in ("concurrency", "compile", "fuzz", "repeats")),
    ],
    "cpu": ["tests/unit/test_cpu_backend.py"],
}
FEWER = {"MOE_OPS_FUZZ_EXAMPLES": "60", "MOE_OPS_REPEATS": "100"}
SECONDS_TO_SAY = 30


def run(device: str, seconds: float, processes: int) -> tuple[str, bool]:
    """(what pytest printed, whether it came to its end)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES[device]]
    command += ["-m", "gpu" if device == "cuda" else "not gpu"]
    if processes > 1:
        command += ["-n", str(processes)]
    env = {**os.environ, **FEWER, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=seconds)[0], True
    except subprocess.TimeoutExpired:
        pass
    # As Ctrl-C does: pytest then says what it has seen so far.
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=SECONDS_TO_SAY)[0], False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], False


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by pytest's last line."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error|skipped|no tests)", line)]
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", lines[-1]) if lines else []
    return {name.rstrip("s") if name == "errors" else name: int(number) for number, name in found}


def main() -> int:
    """Runs the tests; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--seconds", type=float, default=240.0, help="for all tests (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=cuda)
    most = max(1, min(10, (os.cpu_count() or 1) // 2)) if importlib.util.find_spec("xdist") else 1
    parser.add_argument("--processes", type=int, default=most, help="of pytest (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE")
    options = parser.parse_args()
    start = time.monotonic()
    output, finished = run(options.device, options.seconds, options.processes)
    print(output)
    found = counts(output)
    facts = {"finished": finished, "seconds": round(time.monotonic() - start), **FEWER, "files": FILES[options.device]}
    print(found, "" if finished else "and the time was over before the last test")
    good = found.get("passed", 0) > 0 and not found.get("failed") and not found.get("error")
    if good:
        write(options.json, head(**facts, counts=found))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
