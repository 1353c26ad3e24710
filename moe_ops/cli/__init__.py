"""The command line: `python -m moe_ops <command>`."""

import argparse
import sys
from collections.abc import Sequence

from moe_ops.cli import aot, bench, doctor, env, explain, traffic, tune
from moe_ops.cli.options import HelpFormatter, UsageError

_COMMANDS = (env, explain, doctor, tune, bench, aot, traffic)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is a `--help` away."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command's function as `run`."""
    parser = _Parser(
        prog="python -m moe_ops",
        description="Tools of the moe_ops operator. Each has a --help of its own.",
        epilog="New here? `doctor` checks the installation, `explain` says how calls of a model would run. Exit "
        "status: 0; 2 where arguments are wrong, which one line says; 1 where something else is.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2 for wrong arguments)."""
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"python -m moe_ops {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m moe_ops {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `... | head`
        sys.stderr.close()
        return 1
