"""What a call of the op costs the host before any kernel: python benchmarks/host_cost.py [--device cuda] [--check]

The calls have no tokens: nothing is computed and nothing launched, on any device. What is left is

* function: the Python function behind the op, called as such: a call's arguments checked, or rather looked up among
  those seen before, its plan with them, and a result allocated;
* op: torch.ops.moe_ops.fused_moe_tma.default, which is the dispatcher, autograd and that function;
* fused_moe: moe_ops.fused_moe, the typed function, which calls the op with all its arguments by name.

A number is the fastest of many rounds of some thousand calls in one thread; other programs on the machine only add to
it. The three take turns. "op adds" is op less function. --check: exit status 1 if that is more than 5 us in
inference_mode, or 10 us otherwise.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

import torch
from record import head, write

import moe_ops
from moe_ops import registration
from moe_ops.testing import random_inputs

ALLOWED = {"inference_mode": 5.0, "no_grad": 10.0, "grad": 10.0, "grad, weights are Parameters": 10.0}
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def microseconds(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """The time of each call, by name."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats * 1e6)
    return best


def measure(mode: str, device: str, rounds: int, repeats: int) -> dict[str, float]:
    """The times in a mode of autograd."""
    args = random_inputs(num_tokens=0, hidden=64, intermediate=32, experts=4, top_k=2, device=device)
    if "Parameters" in mode:
        args.w1, args.w2 = torch.nn.Parameter(args.w1), torch.nn.Parameter(args.w2)
    tensors = tuple(args.tensors().values())
    op, function = torch.ops.moe_ops.fused_moe_tma.default, registration._fused_moe
    calls = {
        "function": lambda: function(*tensors),
        "op": lambda: op(*tensors),
        "fused_moe": lambda: moe_ops.fused_moe(*tensors),
    }
    with MODES.get(mode, torch.enable_grad)():
        return microseconds(calls, rounds, repeats)


def main() -> int:
    """Prints a table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the tensors (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of which the fastest counts (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1000, help="calls in a round (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the op adds more than it may")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"microseconds a call, M = 0, tensors on {options.device}")
    print("| mode | function | op | op adds | allowed | fused_moe |\n|" + " --- |" * 6)
    good, rows = True, []
    for mode, allowed in ALLOWED.items():
        took = measure(mode, options.device, options.rounds, options.repeats)
        added = took["op"] - took["function"]
        good &= added <= allowed
        rows.append([mode, took["function"], took["op"], added, allowed, took["fused_moe"]])
        print(
            f"| {mode} | {took['function']:.1f} | {took['op']:.1f} | {added:.1f} | {allowed:.0f} | "
            f"{took['fused_moe']:.1f} |"
        )
    columns = ["mode", "function", "op", "op adds", "aim", "fused_moe"]
    facts = {"dtype": "float32", "tensors": options.device, "cores": os.cpu_count()}
    write(options.json, head(**facts, columns=columns, rows=rows))
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
