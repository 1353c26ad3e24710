"""`python -m moe_ops explain`: how calls of a model would run, here or on another device."""

import argparse
import json
from dataclasses import asdict

import torch

from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import ARCHITECTURES, CARDS, Card, current_card, known_card
from moe_ops.cli.limits import expected_work
from moe_ops.cli.options import (
    HelpFormatter,
    UsageError,
    add_dtype_option,
    add_format_option,
    add_shape_options,
    add_tokens_option,
    chosen_shapes,
)
from moe_ops.cli.output import show_table
from moe_ops.cli.problems import describe_call
from moe_ops.devices import describe
from moe_ops.dispatch import Plan, make_plan
from moe_ops.tuning import TileConfig

_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
_COLUMNS = ("M", "path", "variant", "up", "down", "from", "workspace", "at least")

_EXAMPLES = """examples:
  python -m moe_ops explain --model qwen3-30b-a3b
  python -m moe_ops explain --model deepseek-v3 --tp 8 --format fp8_block --device h200 --tokens 1,64,4096
  python -m moe_ops explain --shape 8,2,4096,14336 --device sm_80 --json

Columns: path and variant are the kernels (docs/kernels.md); a tile is block_m x block_n x block_k, then w warps, s
stages, g rows of blocks in a group, T for swapped operands, /4 for K in four parts; "from" is the heuristic or the
table of tuned tiles (docs/tuning.md); workspace is device memory taken beside the result; "at least" is the larger of
the FLOPs and bytes over the ceilings of the device's data sheet: no implementation is faster, and none reaches it."""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "explain",
        help="say how calls of a model would run: path, reason, tiles, workspace, least time",
        description="Says how the op would run calls of a model, without running any: which path and kernels and why, "
        "with what tiles, how much memory they take, and how long they take at least. It needs no GPU: --device names "
        "one that is not here.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_shape_options(parser, "one of --model, --common and --shape is needed")
    add_tokens_option(parser, _TOKENS)
    add_dtype_option(parser, "float32")
    add_format_option(parser)
    parser.add_argument(
        "--path", choices=("auto", "tma", "classic", "reference"), default="auto", metavar="NAME",
        help="as the op's: auto, tma, classic, reference (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="NAME",
        help=f"of {', '.join((*CARDS, *ARCHITECTURES))}, or cpu (default: the current GPU, else the CPU)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    shapes = chosen_shapes(options)
    if not shapes:
        raise UsageError("it needs a --model, a --shape or --common; --help lists the known ones")
    card = find_card(options.device)
    form, dtype = FORMATS.get(options.format), getattr(torch, options.dtype)
    record = {"device": card.device.name, "dtype": options.dtype, "format": options.format, "calls": []}
    for name, sizes in shapes.items():
        for tokens in options.tokens:
            try:
                problem = describe_call(sizes, tokens, dtype, form, options.path)
                plan = make_plan(problem, card.device)
            except (ValueError, TypeError) as error:
                raise UsageError(f"{name}, M = {tokens}: {error}") from error
            least = None
            if card.gigabytes:
                multiplies_bytes = form is not None and form.multiplies_bytes and plan.path in ("tma", "classic")
                least = expected_work(problem).limit(card.rates(multiplies_bytes=multiplies_bytes))
            record["calls"].append(_call(name, sizes, tokens, plan, least))
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        _show(record, shapes)
    return 0


def find_card(name: str | None) -> Card:
    """The device that was asked for, else the current GPU, else the CPU.

    Raises:
        UsageError: it is not known.
    """
    if name == "cpu":
        return _cpu()
    if name is None:
        return current_card() or _cpu()
    try:
        return known_card(name)
    except ValueError as error:
        raise UsageError(f"--device {error}; or cpu") from error


def _cpu() -> Card:
    return Card(describe(torch.device("cpu")), 0.0, None, 0.0)


def _call(name: str, sizes: tuple, tokens: int, plan: Plan, least: tuple[float, str] | None) -> dict:
    return {
        "shape": name,
        "sizes": sizes,
        "tokens": tokens,
        "path": plan.path,
        "reason": plan.reason,
        "variant": plan.variant,
        "up": plan.up and asdict(plan.up),
        "down": plan.down and asdict(plan.down),
        "splits": plan.splits,
        "source": plan.source,
        "workspace_bytes": plan.workspace_bytes,
        "least_ms": least and least[0],
        "bound": least and least[1],
    }


def describe_tile(tile: TileConfig, splits: int = 1) -> str:
    """A tile in a few characters, and how many programs share it."""
    blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    forms = f"{' T' if tile.swap_ab else ''}{f' /{splits}' if splits > 1 else ''}"
    return f"{blocks} w{tile.num_warps} s{tile.num_stages} g{tile.group_m}{forms}"


def _show(record: dict, shapes: dict) -> None:
    for name in shapes:
        calls = [call for call in record["calls"] if call["shape"] == name]
        rows = [
            (
                call["tokens"],
                call["path"],
                call["variant"] or None,
                call["up"] and describe_tile(TileConfig(**call["up"])),
                call["down"] and describe_tile(TileConfig(**call["down"]), call["splits"]),
                (call["source"] if call["source"] == "heuristic" else "table") if call["source"] else None,
                f"{call['workspace_bytes'] / 2**20:.1f} MiB" if call["workspace_bytes"] else None,
                call["least_ms"] and f"{call['least_ms']:.4f} ms ({call['bound']})",
            )
            for call in calls
        ]
        sizes = "E={}, top_k={}, H={}, I={}".format(*calls[0]["sizes"])
        form = "" if record["format"] == "none" else f", {record['format']}"
        show_table(f"{name} ({sizes}), {record['dtype']}{form}, on {record['device']}", _COLUMNS, rows)
        for reason in dict.fromkeys(f"{call['path']}: {call['reason']}" for call in calls):
            print(reason)
        for source in dict.fromkeys(call["source"] for call in calls if call["source"] not in ("", "heuristic")):
            print(f"table: {source}")
