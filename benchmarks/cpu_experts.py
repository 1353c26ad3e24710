"""Times the op on the CPU against the two experts implementations of transformers that run there.

Both are called on a real `Qwen3MoeExperts` module that holds the same weights: "eager" is the module's own loop over
the experts, "grouped_mm" is `experts_implementation="grouped_mm"`. The three must agree before anything is timed. Runs
alternate in a random order, and the ratios are medians of per-round ratios. Rounds during which other processes used
the CPU are left out as long as there are enough others; a row made of busy rounds says so.

    python benchmarks/cpu_experts.py [--rounds 15] [--tokens 1 16 256 2048] [--dtypes bfloat16 float32] [--json FILE]
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_ops

OURS, BASELINES = "moe_ops", ("eager", "grouped_mm")
# A block of rounds counts as quiet if other processes took no more than this share of the CPU time during it.
BLOCK_SECONDS, QUIET_SHARE = 0.3, 0.05
# Two implementations that round differently, relative to the largest element of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

HEADER = "   dtype     M  moe_ops ms   eager ms  grouped_mm ms  vs eager  vs grouped_mm  rounds"
ROW = (
    "{dtype:>8} {M:>5} {moe_ops_ms:>11.2f} {eager_ms:>10.2f} {grouped_mm_ms:>14.2f} {vs_eager:>8.2f}x "
    "{vs_grouped_mm:>13.2f}x {rounds:>7}"
)

Round = dict[str, float]
"""Seconds of one run of each contender, by name."""


def make_experts(args: argparse.Namespace, dtype: torch.dtype) -> Qwen3MoeExperts:
    """An experts module with random weights of unit gain."""
    config = Qwen3MoeConfig(
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
    )
    experts = Qwen3MoeExperts(config).to(dtype)
    for weight in experts.parameters():
        weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return experts.requires_grad_(False)


def make_contenders(experts: Qwen3MoeExperts, num_tokens: int, top_k: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: each takes nothing and returns [M, H]."""
    dtype = experts.down_proj.dtype
    hidden_states = torch.randn(num_tokens, experts.hidden_dim).to(dtype)
    scores = torch.randn(num_tokens, experts.num_experts).softmax(-1)
    topk_weights, topk_ids = scores.topk(top_k)
    topk_weights = (topk_weights / topk_weights.sum(-1, keepdim=True)).to(dtype)

    def module(implementation: str) -> Tensor:
        experts.config._experts_implementation = implementation
        return experts(hidden_states, topk_ids, topk_weights)

    def ours() -> Tensor:
        return torch.ops.moe_ops.fused_moe_tma(
            hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids
        )

    return {OURS: ours} | {name: lambda name=name: module(name) for name in BASELINES}


def check(contenders: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Raises RuntimeError if two of the contenders disagree. Also warms them up."""
    results = {name: contender().float() for name, contender in contenders.items()}
    ours = results[OURS]
    for name in BASELINES:
        error = ((ours - results[name]).abs().max() / results[name].abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{OURS} and {name} differ by {error:.1e} of the largest element in {dtype}")


class LoadMeter:
    """How much of the machine's CPU time went to others than this process; 0 where the system does not tell."""

    def __init__(self):
        self._last = self._read()

    def _read(self) -> tuple[float, float, float]:
        own = sum(os.times()[:2])
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return 0.0, 0.0, own
        tick = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields) / tick, (sum(fields) - idle) / tick, own

    def share(self) -> float:
        """The others' share since the last call."""
        before, self._last = self._last, self._read()
        total, busy, own = (now - then for now, then in zip(self._last, before, strict=True))
        return max(0.0, (busy - own) / total) if total > 0 else 0.0


def measure(contenders: dict[str, Callable[[], Tensor]], rounds: int, seconds: float) -> tuple[list[Round], bool]:
    """At least `rounds` rounds: quiet ones as far as `seconds` allow, all of them otherwise; and whether quiet."""
    quiet, busy = [], []
    names = list(contenders)
    meter, deadline = LoadMeter(), time.perf_counter() + seconds
    while len(quiet) < rounds and (time.perf_counter() < deadline or len(quiet) + len(busy) < rounds):
        block, block_end = [], time.perf_counter() + BLOCK_SECONDS
        while not block or time.perf_counter() < block_end:
            random.shuffle(names)
            times = {}
            for name in names:
                start = time.perf_counter()
                contenders[name]()
                times[name] = time.perf_counter() - start
            block.append(times)
        (quiet if meter.share() <= QUIET_SHARE else busy).extend(block)
    return (quiet, True) if len(quiet) >= rounds else (quiet + busy, False)


def summarise(rounds: list[Round], quiet: bool) -> dict[str, float]:
    """Medians in milliseconds, and how many times faster than each baseline ours is."""
    row = {f"{name}_ms": 1e3 * statistics.median(times[name] for times in rounds) for name in rounds[0]}
    for name in BASELINES:
        row[f"vs_{name}"] = statistics.median(times[name] / times[OURS] for times in rounds)
    return row | {"rounds": len(rounds), "quiet": quiet}


def cpu_name() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(args: argparse.Namespace) -> dict[str, object]:
    """Where and with what the numbers were taken."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_ops": moe_ops.__version__,
        "E": args.experts,
        "top_k": args.top_k,
        "H": args.hidden,
        "I": args.intermediate,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="runs of each implementation, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="wait this long per row for quiet rounds")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048])
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=dtypes)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Runs every row and prints the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    facts = environment(args)
    print("  ".join(f"{key}={value}" for key, value in facts.items()))
    print(HEADER)
    rows = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        experts = make_experts(args, dtype)
        for num_tokens in args.tokens:
            contenders = make_contenders(experts, num_tokens, args.top_k)
            check(contenders, dtype)
            row = summarise(*measure(contenders, args.rounds, args.seconds))
            rows.append({"dtype": name, "M": num_tokens} | row)
            print(ROW.format(**rows[-1]) + ("" if row["quiet"] else "  (busy machine)"), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
