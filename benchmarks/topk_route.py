"""The router's time in a CUDA graph, beside the same in torch's operators: python benchmarks/topk_route.py

Microseconds a call: the median of rounds in turns, each a replay of a graph of many calls behind one another, so that a
launch costs what it costs in a captured model.
"""

import argparse

import torch
from record import head, write

import moe_ops
from moe_ops.cli import harness
from moe_ops.router import make_router, topk_route_in_torch

ROUTERS = {
    "E = 128, top 8, softmax, renormalised": (128, 8, {"renormalize": True}),
    "E = 256 in 8 groups, top 8, sigmoid": (
        256, 8,
        {
            "scoring": "sigmoid", "renormalize": True, "num_groups": 8, "topk_groups": 4, "group_score": "top2",
            "routed_scaling_factor": 2.5,
        },
    ),
}  # fmt: skip
CALLS = 50


def composed(logits, top_k, bias, options):
    """What a model does in torch's operators, in the fewest of them."""
    if options.get("num_groups", 1) > 1:
        scores = logits.sigmoid()
        choice = scores + bias
        groups = choice.view(len(choice), options["num_groups"], -1)
        best = groups.topk(2, -1).values.sum(-1).topk(options["topk_groups"], -1, sorted=False).indices
        mask = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = groups.masked_fill(~mask[..., None], -torch.inf).flatten(1)
        ids = choice.topk(top_k, -1, sorted=False).indices
        weights = scores.gather(1, ids)
    else:
        weights, ids = logits.softmax(-1).topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * options.get("routed_scaling_factor", 1.0), ids.int()


def repeated(function):
    """Calls of it behind one another."""

    def call():
        for _ in range(CALLS):
            result = function()
        return result

    return call


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("| router | M | topk_route us | torch us | ratio |\n|" + " --- |" * 5)
    rows = []
    for name, (experts, top_k, router) in ROUTERS.items():
        bias = 0.1 * torch.randn(experts, device="cuda") if "num_groups" in router else None
        for num_tokens in options.tokens:
            logits = torch.randn(num_tokens, experts, device="cuda")
            expected = topk_route_in_torch(logits, bias, make_router(logits, top_k, bias, **router))
            got = moe_ops.topk_route(logits, top_k, bias, **router)
            assert torch.equal(got[1], expected[1])
            torch.testing.assert_close(got[0], expected[0])
            calls = {
                "ours": lambda: moe_ops.topk_route(logits, top_k, bias, **router),  # noqa: B023
                "torch": lambda: composed(logits, top_k, bias, router),  # noqa: B023
            }
            graphs = {name: harness.capture(repeated(call)) for name, call in calls.items()}
            timings = harness.time_round_robin(graphs, options.rounds, harness.device_milliseconds, harness.L2Flush())
            ours, torchs = (timings.median(name) * 1e3 / CALLS for name in ("ours", "torch"))
            rows.append([name, num_tokens, ours, torchs, torchs / ours])
            print(f"| {name} | {num_tokens} | {ours:.2f} | {torchs:.2f} | {torchs / ours:.1f} |", flush=True)
    columns = ["router", "M", "topk_route us", "torch us", "ratio"]
    write(options.json, head(dtype="float32", columns=columns, rows=rows))


if __name__ == "__main__":
    main()
