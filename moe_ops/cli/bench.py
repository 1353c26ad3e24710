"""`python -m moe_ops bench`: the whole op against its ceilings and its peers."""

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import moe_ops
from moe_ops.cli import plots, table
from moe_ops.cli.ahead import MOST_WORKERS, compile_ahead, default_workers, planned
from moe_ops.cli.calls import ROUTINGS, SHAPES, TOKENS, make_calls
from moe_ops.cli.export import compare, load_record, write_csv, write_markdown
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.measure import OURS, measure, start_session
from moe_ops.cli.options import (
    HelpFormatter,
    add_dtype_option,
    add_format_option,
    add_shape_options,
    add_tokens_option,
    check_files,
    chosen_shapes,
    natural,
    positive,
)
from moe_ops.cli.peers import PEERS
from moe_ops.cli.progress import Progress
from moe_ops.cli.recorded import beside, check_recorded, load_peers
from moe_ops.cli.tuner.calls import Call
from moe_ops.devices import Device, describe
from moe_ops.tuning import VARIANTS
from moe_ops.tuning.table import Tiles

_PATHS = ("tma", "classic")
DEFAULT_VARIANTS = (*_PATHS, "grouped_mm")
_DEVICE = "cuda"


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the whole op on model shapes",
        description="Times the whole op, from topk_ids to the output, in CUDA graphs with the L2 flushed; variants, "
        "a cuBLAS product and a read-only stream take turns in every round, since the card's clocks follow its power. "
        "The limit of a cell is the larger of its FLOPs over that cuBLAS rate and its bytes over that stream; the "
        "padded limit counts the FLOPs of the padding rows too. Each variant's result is compared with ours first. "
        "With --format the weights are quantised, and some tokens of each result are held against an oracle too; in a "
        "format whose GEMMs multiply fp8 or int8, a product by torch._scaled_mm in fp8 takes its turn as well, and its "
        "rate is the one in the limits.",
        epilog="examples:\n  python -m moe_ops bench --model qwen3-30b-a3b --tokens 1,64,4096\n"
        "  python -m moe_ops bench --model deepseek-v3 --tp 8 --format fp8_block --stages --json now.json\n"
        "  python -m moe_ops bench --common --variant heuristic --variant tuned --markdown tiles.md\n"
        "  python -m moe_ops bench --shape 8,2,4096,14336 --compare before.json --markdown table.md --plot plots",
        formatter_class=HelpFormatter,
    )
    calls = parser.add_argument_group("calls to time")
    add_shape_options(calls, "default, without --model and --common: all named")
    add_tokens_option(calls, TOKENS)
    calls.add_argument(
        "--routing", action="append", choices=ROUTINGS, metavar="NAME",
        help=f"how tokens choose experts: {', '.join(ROUTINGS)}; repeatable (default: uniform)",
    )  # fmt: skip
    add_dtype_option(calls)
    add_format_option(calls)
    what = parser.add_argument_group("what is timed")
    variants = f"{', '.join((*OURS, *PEERS))}; repeatable (default: {' '.join(DEFAULT_VARIANTS)}; with --format "
    variants += (
        f"{' '.join(_PATHS)}). tma and classic are our paths; heuristic is the op without a table of tuned tiles, "
    )
    what.add_argument(
        "--variant", action="append", choices=(*OURS, *PEERS), metavar="NAME",
        help=f"{variants}tuned with one where there is one; {', '.join(VARIANTS)} are kernel variants, whatever a call "
        "would take; the others are peers, for unquantised weights",
    )  # fmt: skip
    what.add_argument("--peers", action="store_true", help="add every peer that can be imported")
    what.add_argument("--stages", action="store_true", help="time quantize, route, up, down and combine alone too")
    what.add_argument(
        "--rounds", type=positive, default=15, metavar="N", help="samples per cell and variant (default: 15)"
    )
    what.add_argument("--eager", action="store_true", help="time eager calls instead of CUDA graphs")
    what.add_argument(
        "--workers", type=natural, metavar="N",
        help="processes that compile our kernels before anything is timed, where Triton's cache lacks some (default: "
        f"as many as CPUs, {MOST_WORKERS} at most; 0: each kernel is compiled when it is first launched)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--recorded", metavar="FILE", help="show the best of the peers recorded in FILE beside ours")
    output.add_argument("--json", metavar="FILE", help="write everything measured to FILE, after every cell")
    output.add_argument("--csv", metavar="FILE", help="write a line for each cell and variant to FILE, at the end")
    output.add_argument("--markdown", metavar="FILE", help="write a Markdown table to FILE, at the end")
    output.add_argument("--compare", metavar="FILE", help="compare with the --json FILE of another run, at the end")
    output.add_argument("--plot", metavar="DIR", help="write plots to DIR, at the end (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    # All that can be wrong is found before minutes of measuring.
    try:
        variants, unavailable = choose_variants(options)
        peers = check_options(options, variants)
        shapes = chosen_shapes(options) or SHAPES
        before = load_record(options.compare) if options.compare else None
    except ValueError as error:
        print(f"python -m moe_ops bench: error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("python -m moe_ops bench: error: it needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    routings = list(dict.fromkeys(options.routing or ["uniform"]))
    record = _head(options, variants, unavailable)
    with Progress(len(shapes) * len(routings) * len(options.tokens)) as progress:
        progress.say(" ".join(f"{key}={value}" for key, value in record.items() if isinstance(value, str)))
        for name, reason in unavailable.items():
            progress.say(f"not measured: {name}: {reason}")
        if options.workers != 0:
            _compile(options, progress)
        progress.say(table.header(variants, recorded=peers is not None))
        form, dtype = FORMATS.get(options.format), getattr(torch, options.dtype)
        fp8 = form is not None and form.multiplies_bytes
        session = start_session(options.rounds, graph=not options.eager, fp8=fp8)
        for shape, sizes in shapes.items():
            for routing, args in make_calls(sizes, options.tokens, routings, dtype, _DEVICE, form):
                progress.begin(f"{shape} {routing} M={args.hidden_states.shape[0]}")
                cell = {"shape": shape, "sizes": sizes, "routing": routing}
                cell |= measure(args, variants, session, stages=options.stages)
                if peers is not None:
                    cell["recorded"] = beside(cell, peers)
                record["cells"].append(cell)
                _say(cell, variants, progress, recorded=peers is not None)
                if options.json:
                    Path(options.json).write_text(json.dumps(record, indent=1))
                progress.advance()
            del args  # the next shape's weights are made after this
    print(table.differences(record["cells"]))
    for line in table.tiles(record["cells"]):
        print(line)
    if form is not None:
        print(table.oracle(record["cells"]))
    if before is not None:
        print(compare(before, record))
    if options.csv:
        write_csv(record, options.csv)
    if options.markdown:
        write_markdown(record, options.markdown)
    if options.plot:
        for file in plots.plot(record, options.plot):
            print(file)
    return 0


def choose_variants(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """What will be timed, and why the rest of what was asked for will not.

    Raises:
        ValueError: nothing of it can run.
    """
    asked = list(dict.fromkeys(options.variant or (DEFAULT_VARIANTS if options.format == "none" else _PATHS)))
    if options.format != "none" and (options.peers or set(asked) & set(PEERS)):
        name = "--peers" if options.peers else f"--variant {next(name for name in asked if name in PEERS)}"
        raise ValueError(f"{name} multiplies unquantised weights; leave out --format, or pass --recorded")
    if options.peers:
        asked += [name for name in PEERS if name not in asked]
    unavailable = {name: reason for name in asked if name in PEERS and (reason := PEERS[name].obstacle())}
    variants = [name for name in asked if name not in unavailable]
    if not variants:
        raise ValueError("nothing to time: " + "; ".join(f"{name}: {why}" for name, why in unavailable.items()))
    return variants, unavailable


def check_options(options: argparse.Namespace, variants: list[str]) -> dict | None:
    """Checks options that argparse cannot check alone, and makes the folder of plots; returns the recorded peers.

    Raises:
        ValueError: the options do not go together, or a file or folder cannot be used.
    """
    if options.eager and (options.stages or options.recorded):
        name = "--stages" if options.stages else "--recorded"
        raise ValueError(f"{name} is about CUDA graphs; leave out --eager")
    if options.stages and not set(OURS) & set(variants):
        raise ValueError(f"--stages times paths of ours; add --variant {OURS[0]}")
    check_files(options, "json", "csv", "markdown")
    if options.plot:
        if not plots.available():
            raise ValueError(plots.MISSING)
        try:
            Path(options.plot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--plot {options.plot} is not a folder: {error.strerror}") from error
    if not options.recorded:
        return None
    peers = load_peers(options.recorded)
    check_recorded(peers, f"--recorded {options.recorded}", options.dtype, options.format)
    return peers


def own_calls(options: argparse.Namespace, device: Device) -> Iterator[tuple[Call, Tiles]]:
    """The calls of ours that a run makes, with the tiles that they get on a device."""
    shapes = (chosen_shapes(options) or SHAPES).values()
    # "auto" is what all others are held against.
    names = dict.fromkeys(("auto", *(name for name in options.variant or _PATHS if name in OURS)))
    return planned(shapes, options.tokens, options.dtype, options.format, names, device)


def _compile(options: argparse.Namespace, progress: Progress) -> None:
    """Has what Triton's cache lacks compiled, and says so."""
    device = describe(torch.device(_DEVICE, 0))
    ahead = compile_ahead(
        own_calls(options, device), device, options.workers or default_workers(),
        lambda done, parts: progress.begin(f"compiling, {done} of {parts}"),
    )  # fmt: skip
    if ahead.missing:
        progress.say(str(ahead))


def _head(options: argparse.Namespace, variants: list[str], unavailable: dict[str, str]) -> dict:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moe_ops": moe_ops.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": options.dtype,
        **({} if options.format == "none" else {"format": options.format}),
        "mode": "eager" if options.eager else "graph",
        "variants": {name: _versions(name) for name in variants},
        "unavailable": unavailable,
        "cells": [],
    }


def _versions(variant: str) -> dict[str, str]:
    """Of the packages behind a variant, where they say."""
    packages = {module.split(".")[0] for module in PEERS[variant].modules} if variant in PEERS else ()
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _say(cell: dict, variants: list[str], progress: Progress, *, recorded: bool) -> None:
    for line in (table.row(cell, variants, recorded=recorded), *table.stage_lines(cell)):
        progress.say(line)
    for name, error in cell["errors"].items():
        progress.say(f"    {name}: {error}", file=sys.stderr)
