"""Options that several commands share, and what their values have to be."""

import argparse

from moe_ops.cli.calls import SHAPES, Sizes, parse_shape
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.models import COMMON, MODELS, find_sizes


class UsageError(ValueError):
    """Arguments that argparse cannot find wrong alone: one line, exit status 2."""


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def token_counts(text: str) -> tuple[int, ...]:
    """Comma-separated numbers above 0."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers above 0")
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
        help=f"every model of {', '.join(d.name for d in COMMON)} that is served in this --format",
    )  # fmt: skip
    parser.add_argument(
        "--shape", action="append", type=shape, default=[], metavar="SHAPE",
        help=f"E,TOPK,H,I as one rank has them, or one of {', '.join(SHAPES)}; repeatable ({default})",
    )  # fmt: skip
    ranks = "ranks that share {} of --model, where its name does not say"
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help=ranks.format("each expert"))
    parser.add_argument("--ep", type=positive, default=1, metavar="N", help=ranks.format("the experts"))


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
