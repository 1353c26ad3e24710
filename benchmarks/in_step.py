"""What it is worth that the programs of the persistent kernels keep in step: python benchmarks/in_step.py

Times the up and the down GEMM of the ping-pong kernel (or of the block-scaled one, with --format fp8_block) in CUDA
graphs, in the same rounds, with programs that wait for each other and with programs that do not.
"""

import argparse

import torch
from record import head, write

from moe_ops import plans
from moe_ops.backends import pipeline, tma
from moe_ops.cli import harness
from moe_ops.cli.calls import SHAPES, make_calls
from moe_ops.cli.formats import FORMATS
from moe_ops.testing import override

# More than a program can ever expect: no wait is a wait.
_FAR = 2**30


def stages(args, variant: str, *, together: bool) -> dict[str, harness.Captured]:
    """The stages of a call, each a CUDA graph."""
    with override(path="tma", variant=variant):
        problem, plan = plans.plan(args)
    out = torch.empty(problem.out_shape, dtype=problem.out_dtype, device=args.hidden_states.device)
    sort = pipeline.sort_routes

    def sort_and_let_go(*sort_args):
        routing = sort(*sort_args)
        sort_args[-1].fill_(_FAR)
        return routing

    pipeline.sort_routes = sort if together else sort_and_let_go
    try:
        return harness.capture_stages(lambda: tma.stages(args, problem, plan, out))
    finally:
        pipeline.sort_routes = sort


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--format", choices=FORMATS, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    variant = "blockscaled" if options.format == "fp8_block" else "pingpong"
    flush, rows = harness.L2Flush(), []
    print(torch.cuda.get_device_name(), "torch", torch.__version__, options.format or "bfloat16")
    print("| shape | M | up alone us | up in step us | down alone us | down in step us |\n|" + " --- |" * 6)
    for shape, sizes in SHAPES.items():
        form = FORMATS.get(options.format)
        for _, args in make_calls(sizes, options.tokens, ["uniform"], torch.bfloat16, "cuda", form):
            calls = {}
            for together in (False, True):
                for name, stage in stages(args, variant, together=together).items():
                    calls[name, together] = stage
            timings = harness.time_round_robin(calls, options.rounds, harness.device_milliseconds, flush)
            times = [timings.median((name, together)) * 1e3 for name in ("up", "down") for together in (False, True)]
            rows.append([shape, args.hidden_states.shape[0], *times])
            cells = [f"{time:.0f}" for time in times]
            print(f"| {shape} | {args.hidden_states.shape[0]} | {' | '.join(cells)} |", flush=True)
        del args
    columns = ["shape", "M", "up alone us", "up in step us", "down alone us", "down in step us"]
    facts = {"dtype": "bfloat16"} | ({"format": options.format} if options.format else {})
    write(options.json, head(**facts, columns=columns, rows=rows))


if __name__ == "__main__":
    main()
