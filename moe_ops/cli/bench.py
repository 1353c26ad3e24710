"""`python -m moe_ops bench`: the whole op against its ceilings and its peers."""

import argparse
import datetime
import json
import math
import sys

import torch

from moe_ops.arguments import Arguments

# (E, top_k, H, I): models people serve, and what one rank of a parallel deployment sees of them.
SHAPES = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
    "deepseek-v3-ep": (32, 1, 7168, 2048),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
VARIANTS = ("tma", "classic", "grouped_mm")


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the whole op on model shapes",
        description="Times the whole op, from topk_ids to the output, in CUDA graphs with the L2 flushed; variants, "
        "a cuBLAS product and a read-only stream take turns in every round, since the card's clocks follow its power. "
        "The limit of a cell is the larger of its FLOPs over that cuBLAS rate and its bytes over that stream.",
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="a model shape; repeatable (default: all)")
    parser.add_argument("--tokens", type=_tokens, default=TOKENS, help="token counts, comma-separated")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable (default: all)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=_rounds, default=15, help="samples per cell and variant")
    parser.add_argument("--eager", action="store_true", help="time eager calls instead of CUDA graphs")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    parser.set_defaults(run=run)


def _tokens(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers above 0")
    return counts


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if not torch.cuda.is_available():
        print("bench needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    import triton

    from moe_ops.cli.harness import Ceilings

    ceilings = Ceilings()
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": options.dtype,
        "mode": "eager" if options.eager else "graph",
        "cells": [],
    }
    variants = options.variant or list(VARIANTS)
    print(" ".join(f"{key}={value}" for key, value in record.items() if key != "cells"))
    print(f"{'shape':16s} {'M':>6s} " + " ".join(f"{name + ' ms':>14s}" for name in variants) + "   limit ms  of limit")
    for shape in options.shape or SHAPES:
        for args in _calls(shape, options):
            cell = _measure(shape, args, variants, ceilings, options)
            record["cells"].append(cell)
            times = " ".join(_cell_text(cell["ms"].get(name)) for name in variants)
            best = min((cell["ms"][name] for name in variants[:2] if cell["ms"].get(name)), default=math.nan)
            print(
                f"{shape:16s} {cell['tokens']:6d} {times}   {cell['limit_ms']:8.3f}  {cell['limit_ms'] / best:8.2f}",
                flush=True,
            )
            for name, error in cell["errors"].items():
                print(f"    {name}: {error}", file=sys.stderr)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return 0


def _cell_text(milliseconds: float | None) -> str:
    return f"{'-' if milliseconds is None else f'{milliseconds:.4f}':>14s}"


def _calls(shape: str, options: argparse.Namespace):
    """The calls of a shape, one per token count, over one set of weights."""
    from moe_ops.testing import random_inputs

    experts, top_k, hidden, intermediate = SHAPES[shape]
    sizes = {"hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k}
    common = {"dtype": getattr(torch, options.dtype), "device": "cuda"}
    weights = random_inputs(num_tokens=1, **sizes, **common)
    for tokens in options.tokens:
        args = _typical_routing(tokens, sizes | {"intermediate": 8}, common)  # its weights are thrown away
        args.w1, args.w2 = weights.w1, weights.w2
        yield args


def _typical_routing(tokens: int, sizes: dict, common: dict) -> Arguments:
    """Uniform random routing that meets as many experts as can be expected: with few tokens their bytes decide."""
    from moe_ops.testing import random_inputs

    experts, top_k = sizes["experts"], sizes["top_k"]
    expected = round(experts * (1 - (1 - top_k / experts) ** tokens))
    for seed in range(1000):
        args = random_inputs(num_tokens=tokens, **sizes, **common, seed=seed)
        if args.topk_ids.unique().numel() == expected:
            return args
    raise RuntimeError(f"no routing of {tokens} tokens in 1000 meets {expected} of {experts} experts")


def _measure(shape: str, args: Arguments, variants, ceilings, options) -> dict:
    from moe_ops.cli.harness import time_round_robin
    from moe_ops.cli.peers import grouped_mm

    op = torch.ops.moe_ops.fused_moe_tma
    tensors = tuple(args.tensors().values())
    calls = {
        name: (lambda: grouped_mm(args)) if name == "grouped_mm" else (lambda path=name: op(*tensors, path=path))
        for name in variants
    }
    with torch.no_grad():
        timings = time_round_robin(calls | ceilings.variants, options.rounds, graph=not options.eager)
    teraflops = ceilings.teraflops(timings.median("cublas"))
    gigabytes = ceilings.gigabytes(timings.median("stream"))
    routes = args.topk_ids.numel()
    flops = 2 * routes * (args.w1[0].numel() + args.w2[0].numel())
    touched = args.topk_ids.unique().numel() * (args.w1[0].nbytes + args.w2[0].nbytes)
    limits = {
        "flops": flops / teraflops / 1e9,
        "bytes": (touched + 2 * args.hidden_states.nbytes) / gigabytes / 1e6,
    }
    return {
        "shape": shape,
        "tokens": args.hidden_states.shape[0],
        "experts_met": args.topk_ids.unique().numel(),
        "ms": {name: timings.median(name) for name in variants},
        "spread_ms": {name: [min(samples), max(samples)] for name, samples in timings.rounds.items()},
        "errors": timings.errors,
        "cublas_tflops": teraflops,
        "stream_gbs": gigabytes,
        "limit_ms": max(limits.values()),
        "bound": max(limits, key=limits.get),
    }
