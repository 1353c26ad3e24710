"""The command line: `python -m moe_ops <command>`."""

import argparse
from collections.abc import Sequence

from moe_ops.cli import aot, bench


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is a `--help` away."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2 for wrong arguments)."""
    parser = _Parser(prog="python -m moe_ops", description="Tools of the moe_ops operator.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    aot.add_parser(commands)
    bench.add_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)
