"""Options that several commands share, and what their values have to be."""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from moe_ops.cli.calls import MAX_SIZE, SHAPES, Sizes, parse_shape
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.models import COMMON, MODELS, find_sizes


class UsageError(ValueError):
    """Arguments that argparse cannot find wrong alone: one line, exit status 2."""


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, leaves lines that begin with spaces as they are, and breaks no name at a hyphen."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts: list[str] = []
        for raw, group in itertools.groupby(text.splitlines(), lambda line: not line or line.startswith(" ")):
            lines = list(group)
            parts += lines if raw else self._split_lines(" ".join(lines), width)
        return "\n".join(indent + part for part in parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def natural(text: str) -> int:
    """A number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or above")
    return int(text)


def token_counts(text: str) -> tuple[int, ...]:
    """Comma-separated numbers above 0."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or max(counts) > MAX_SIZE:
        highest = f", {MAX_SIZE} at most" if counts and min(counts) > 0 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers above 0{highest}")
    return counts


def shape(text: str) -> tuple[str, Sizes]:
    """(name, sizes) of a named shape or of E,TOPK,H,I."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_shape_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --model, --common, --shape, --tp and --ep."""
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME",
        help="a model's name, or the path of its config.json, with :tp8 or :ep8 behind it for one of so many ranks; "
        f"repeatable; known: {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument(
        "--common", action="store_true",
        help="the models that the package's tables are for, as they are served in this --format (docs/tuning.md)",
    )  # fmt: skip
    parser.add_argument(
        "--shape", action="append", type=shape, default=[], metavar="SHAPE",
        help=f"E,TOPK,H,I as one rank has them, or one of {', '.join(SHAPES)}; repeatable ({default})",
    )  # fmt: skip
    ranks = "ranks that share {} of --model, where its name does not say"
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help=ranks.format("each expert"))
    parser.add_argument("--ep", type=positive, default=1, metavar="N", help=ranks.format("the experts"))


def add_tokens_option(parser: argparse.ArgumentParser, default: Sequence[int]) -> None:
    """Adds --tokens."""
    counts = ",".join(map(str, default))
    parser.add_argument(
        "--tokens", type=token_counts, default=default, metavar="M,...",
        help=f"numbers of tokens of a call, comma-separated (default: {counts})",
    )  # fmt: skip


def add_dtype_option(parser: argparse.ArgumentParser, *more: str) -> None:
    """Adds --dtype."""
    names = ("bfloat16", "float16", *more)
    parser.add_argument(
        "--dtype", choices=names, default="bfloat16", metavar="NAME",
        help=f"what is computed in: {', '.join(names)} (default: bfloat16)",
    )  # fmt: skip


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Adds --format."""
    parser.add_argument(
        "--format", choices=("none", *FORMATS), default="none", metavar="NAME",
        help=f"of the weights: none, {', '.join(FORMATS)} (default: none)",
    )  # fmt: skip


def chosen_shapes(options: argparse.Namespace) -> dict[str, Sizes]:
    """Sizes by name, in the order they were asked for.

    Raises:
        UsageError: a model that is not known, or that cannot be divided as asked.
    """
    shapes = dict(options.shape)
    if (options.tp > 1 or options.ep > 1) and not options.model:
        raise UsageError("--tp and --ep divide a --model; a --shape is what one rank has already")
    common = [d.name for d in COMMON if options.format in d.formats] if options.common else []
    if options.common and not common:
        raise UsageError(f"--common has no model that is served in --format {options.format}; name one with --model")
    for names, ranks in ((common, ()), (options.model, (options.tp, options.ep))):
        for name in names:
            try:
                short, sizes = find_sizes(name, *ranks)
            except ValueError as error:
                raise UsageError(f"--model {name}: {error}") from error
            shapes[short] = sizes
    return shapes


def check_files(options: argparse.Namespace, *names: str) -> None:
    """Checks that the files of options can be written, before minutes are spent on what goes into them.

    Raises:
        UsageError: one cannot; the message names the option.
    """
    for name in names:
        file = getattr(options, name)
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise UsageError(f"--{name} {file} cannot be written: it is a folder, or in one that is not there")
