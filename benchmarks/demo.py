"""An example, run and written down: python benchmarks/demo.py [--json FILE] examples/generate.py [ITS OPTIONS]

The record has what it printed, with files named from the checkout's root, and how long it took; there is none if it
fails.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from record import head, write

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the example; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write it down")
    parser.add_argument("example", nargs=argparse.REMAINDER, help="the example, and its options")
    options = parser.parse_args()
    start = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *options.example], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode == 0:
        seconds = round(time.monotonic() - start, 1)
        printed = done.stdout.replace(f"{ROOT}/", "").splitlines()
        write(options.json, head(example=options.example, seconds=seconds, printed=printed))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
