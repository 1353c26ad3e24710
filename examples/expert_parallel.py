"""A Mixture-of-Experts layer whose experts are spread over processes, beside the same layer in one.

    python examples/expert_parallel.py                                  2 processes, or one for each GPU
    torchrun --nproc-per-node 4 examples/expert_parallel.py             as a program of one's own is started

With NCCL where there are at least two GPUs, else with gloo on the CPU. Every rank has tokens of its own. The layer is
also run with an uneven placement of the experts, in which one rank has two more than another. The exit status is 1 if
a rank's result is not that of the whole layer, but for roundings.
"""

import argparse
import datetime
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUICK = os.environ.get("MOE_OPS_EXAMPLE_QUICK") == "1"
# Before NCCL starts; not every host can do NVLink multicast, and nothing here needs it.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from moe_ops.distributed import ExpertParallel, Placement, shard_state_dict
from moe_ops.nn import MoELayer
from moe_ops.testing import errors

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 6, "top_k": 2} if QUICK else {
    "hidden_size": 512, "intermediate_size": 256, "num_experts": 32, "top_k": 4}  # fmt: skip
# Of float32 and bfloat16: root mean square of the differences, relative to that of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = torch.cuda.device_count() > 1
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if several else "cpu")
    parser.add_argument("--tokens", type=int, default=24 if QUICK else 512, help="of each rank (default %(default)s)")
    parser.add_argument("--calls", type=int, default=2 if QUICK else 20, help="that are timed (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="on the CPU, without torchrun (default %(default)s)")
    args = parser.parse_args()
    for name in ("tokens", "calls", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.device == "cuda" and not several:
        parser.error("--device cuda needs at least 2 GPUs")
    return args


def placements(size: int) -> dict[str, Placement]:
    """Experts in even shares, and one of the last rank's given to the first."""
    even = Placement.even(SIZES["num_experts"], size)
    first, *between, last = even.experts
    if not last:
        return {"even": even}
    return {"even": even, "uneven": Placement(((*first, last[0]), *between, last[1:]))}


def tokens_per_second(layer: MoELayer, x: torch.Tensor, calls: int) -> float:
    """Of all ranks together."""
    layer(x)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return dist.get_world_size() * x.shape[0] * calls / (time.perf_counter() - start)


@torch.no_grad()
def main(rank: int, args: argparse.Namespace, size: int, rendezvous: str) -> None:
    """One rank."""
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=rendezvous, world_size=size, rank=int(
            os.environ.get("RANK", rank)), timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    rank = dist.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)  # the same layer on every rank
    whole = MoELayer(**SIZES, renormalize=True, device=device, dtype=dtype)
    torch.manual_seed(1 + rank)  # and tokens of its own
    x = torch.randn(args.tokens, SIZES["hidden_size"], device=device, dtype=dtype)
    expected, wrong = whole(x).float(), 0
    for name, placement in placements(size).items():
        layer = MoELayer(**SIZES, renormalize=True, device=device, dtype=dtype,
                         ep_group=ExpertParallel(None, placement=placement))  # fmt: skip
        layer.load_state_dict(shard_state_dict(whole.state_dict(), placement, rank))
        difference = errors(layer(x).float(), expected).rms
        worst = torch.tensor([difference], device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        speed = tokens_per_second(layer, x, args.calls)
        ok = worst.item() <= TOLERANCE[dtype]
        wrong += not ok
        if rank == 0:
            shares = "+".join(str(len(experts)) for experts in placement.experts)
            print(f"{name:6} {shares:>12} experts on {size} x {device.type}: differs from one process by "
                  f"{worst.item():.1e} (allowed: {TOLERANCE[dtype]:.0e}), {speed:,.0f} tokens/s")  # fmt: skip
    alone = args.tokens * args.calls
    whole(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(args.calls):
        whole(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
    if rank == 0:
        print(f"all experts in one process: {alone / (time.perf_counter() - start):,.0f} tokens/s")
        plan = layer.experts.explain(args.tokens, SIZES["top_k"])
        print(f"{args.tokens} tokens a rank go by {plan.way}: {plan.reason}")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    options = parse_args()
    if "RANK" in os.environ:  # torchrun
        main(int(os.environ["LOCAL_RANK"]), options, int(os.environ["WORLD_SIZE"]), "env://")
    else:
        count = torch.cuda.device_count() if options.device == "cuda" else options.processes
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(main, (options, count, f"file://{folder}/rendezvous"), count)
