"""`python -m moe_ops aot`: kernels and launch tables for the C++ library. Needs no GPU."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from moe_ops.aot.calls import call_text
from moe_ops.arguments import Arguments
from moe_ops.cli.calls import SHAPES, parse_shape
from moe_ops.cli.options import HelpFormatter, UsageError, positive
from moe_ops.devices import Device

# What dispatch has to know of the devices of an architecture: their name, and shared memory of a block.
_ARCHITECTURES = {90: ("Hopper", 227 * 1024)}
_H100_MULTIPROCESSORS = 132

_EXAMPLES = """examples:
  python -m moe_ops aot --shapes mixtral-8x7b --out build/cpp
  python -m moe_ops aot --shapes 8,2,4096,14336 128,8,2048,768 --tokens 1-256 --out build/cpp
  MOE_OPS_AOT=build/cpp build/cpp/run_package block.pt2 ...           (docs/cpp.md)"""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "aot",
        help="compile kernels ahead of time for the C++ library",
        description="Compiles the kernels that calls launch, and writes machine code and launch tables into a folder, "
        "which the C++ library (csrc_stubs/) reads where MOE_OPS_AOT names it. No GPU is needed. Calls of other shapes "
        "may be in the folder already, and stay.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--arch", type=int, choices=sorted(_ARCHITECTURES), default=90, help="compute capability: 90")
    parser.add_argument(
        "--shapes", nargs="+", required=True, metavar="SHAPE",
        help=f"one of {', '.join(SHAPES)}; or E,TOPK,H,I; or a whole call with its options, as the library's error "
        "names it",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of E,TOPK,H,I")
    parser.add_argument("--tokens", type=_tokens, default=(1, 4096), metavar="FIRST-LAST", help="default: 1-4096")
    parser.add_argument(
        "--multiprocessors", type=positive, default=_H100_MULTIPROCESSORS, metavar="N",
        help="of the GPU (default: 132, those of an H100 SXM and an H200)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print JSON at the end instead of a line for each table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    # Triton may be absent, and the other commands do not need it.
    import triton

    from moe_ops.aot.table import write_table

    name, shared_memory = _ARCHITECTURES[options.arch]
    capability = divmod(options.arch, 10)
    device = Device("cuda", name, capability, options.multiprocessors, shared_memory, triton.__version__, True)
    tables = []
    for shape in options.shapes:
        start = time.perf_counter()
        try:
            text = shape if "=" in shape else call_text(_plain_call(shape, getattr(torch, options.dtype)))
            path = write_table(options.out, text, *options.tokens, device)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--shapes {shape}: {error}") from error
        except OSError as error:
            raise UsageError(f"--out {options.out} cannot be written: {error.strerror}") from error
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - start
        tables.append({"table": str(path), "seconds": round(seconds, 1), "call": text})
        if not options.json:
            print(f"{path}  {seconds:.0f} s  {text}", flush=True)
    if options.json:
        print(json.dumps(tables, indent=1))
    return 0


def _tokens(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        numbers = int(first), int(last or first)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor FIRST-LAST, with 1 <= FIRST <= LAST")
    return numbers


def _plain_call(shape: str, dtype: torch.dtype) -> Arguments:
    """A call of a model's sizes, unquantised, with the op's defaults."""
    _, (experts, top_k, hidden, intermediate) = parse_shape(shape)

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    return Arguments(
        empty(1, hidden), empty(experts, 2 * intermediate, hidden), empty(experts, hidden, intermediate),
        empty(1, top_k, dtype=torch.float32), empty(1, top_k, dtype=torch.int32),
    )  # fmt: skip
