"""The benchmark of the cost of a call on the host, run as a user runs it.

Its times are for a machine at rest, which the one that runs the tests is not: two of them need not even be in order.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_prints_a_row_per_mode():
    done = subprocess.run(
        [sys.executable, "benchmarks/host_cost.py", "--rounds", "2", "--repeats", "50"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["inference_mode", "no_grad", "grad", "grad, weights are Parameters"]
    for _, function, op, added, allowed, wrapper in rows:
        assert all(0 < float(took) < 10_000 for took in (function, op, wrapper))
        assert abs(float(op) - float(function) - float(added)) < 0.2 and allowed in ("5", "10")
