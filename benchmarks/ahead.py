"""Compiles what commands of `python -m moe_ops bench` launch, all in one go: python benchmarks/ahead.py COMMANDS

COMMANDS is a file with a command a line. Each command compiles what Triton's cache lacks by itself, before it times
anything; here the kernels of all of them, each once, are shared out among the CPUs at once.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from record import head, write

from moe_ops.cli import bench, make_parser
from moe_ops.cli.ahead import compile_ahead, default_workers
from moe_ops.devices import describe

COMMAND = ["-m", "moe_ops", "bench"]


def options_of(command: str) -> argparse.Namespace:
    """The options of a command.

    Raises:
        ValueError: it is none of `python -m moe_ops bench`.
    """
    words = shlex.split(command)
    if words[1:4] != COMMAND:
        raise ValueError(f"{command!r} is no command of python {' '.join(COMMAND)}")
    return make_parser().parse_args(words[3:])


def main() -> int:
    """Compiles; the exit status, 1 where a kernel could not be compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", metavar="COMMANDS", help="the file")
    parser.add_argument("--json", metavar="FILE", help="write how many kernels there were, and the seconds, to FILE")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    options = parser.parse_args()
    lines = Path(options.commands).read_text().splitlines()
    if not torch.cuda.is_available():
        parser.error("it compiles for the GPU that is here, and torch sees none")
    device = describe(torch.device("cuda", 0))
    calls = [call for line in lines for call in bench.own_calls(options_of(line), device)]
    ahead = compile_ahead(calls, device, options.workers)
    print(f"commands: {len(lines)}, calls: {len(calls)}, {ahead}")
    for error in ahead.errors:
        print(error, file=sys.stderr)
    facts = {"kernels": ahead.kernels, "compiled": ahead.missing, "workers": ahead.workers}
    write(options.json, head(**facts, seconds=round(ahead.seconds, 1), errors=ahead.errors))
    return 1 if ahead.errors else 0


if __name__ == "__main__":
    sys.exit(main())
