"""Options that several commands share, and what their values have to be."""

import argparse

from moe_ops.cli.calls import SHAPES, Sizes, parse_shape
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.models import MODELS, find_model


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
    """Adds --model, --shape, --tp and --ep."""
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME",
        help=f"a model's name, or the path of its config.json; repeatable; known: {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument(
        "--shape", action="append", type=shape, default=[], metavar="SHAPE",
        help=f"E,TOPK,H,I as one rank has them, or one of {', '.join(SHAPES)}; repeatable ({default})",
    )  # fmt: skip
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="ranks that share each expert of --model")
    parser.add_argument("--ep", type=positive, default=1, metavar="N", help="ranks that share the experts of --model")


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
    for name in options.model:
        try:
            short, model = find_model(name)
            sizes = model.sizes(options.tp, options.ep)
        except ValueError as error:
            raise UsageError(f"--model {name}: {error}") from error
        short += f"-tp{options.tp}" if options.tp > 1 else ""
        short += f"-ep{options.ep}" if options.ep > 1 else ""
        shapes[short] = sizes
    return shapes
