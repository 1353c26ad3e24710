"""A step of a Mixture-of-Experts layer in a CUDA graph: captured once, replayed with other inputs and other weights.

A graph keeps addresses, not numbers. So what changes is written into the tensors it was captured with: the inputs of a
step, and also weights. Steps of several sizes are captured into one pool, the largest first, as a server does it.
On the CPU there are no graphs, and the steps run eagerly. The exit status is 1 if a result is not, to the
bit, that of a call of its own.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import moe_ops

SIZES = (64, 8, 1)
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 8, 2


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    return parser.parse_args()


class Layer(torch.nn.Module):
    """A router and its experts."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5)
        self.w2 = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        topk_weights, topk_ids = self.router(x).float().softmax(-1).topk(TOP_K)
        return moe_ops.fused_moe(x, self.w1, self.w2, topk_weights, topk_ids)


def capture(layer: Layer, x: Tensor, pool) -> tuple[Callable[[], None], Tensor]:
    """(replays the step, the tensor its result will be in). The graph goes with the function."""
    # Kernels are compiled and loaded by a first call; neither belongs into a capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = layer(x)
    return graph.replay, out


def eager(layer: Layer, x: Tensor) -> tuple[Callable[[], None], Tensor]:
    """The same without a graph."""
    out = torch.empty_like(x)
    return lambda: out.copy_(layer(x)), out


@torch.inference_mode()
def main() -> int:
    """Runs the example; the exit status."""
    device = parse_args().device
    torch.manual_seed(0)
    layer = Layer().to(device, torch.bfloat16)
    buffer = torch.randn(max(SIZES), HIDDEN).to(device, torch.bfloat16)
    if device == "cuda":
        pool = torch.cuda.graph_pool_handle()
        steps = {size: capture(layer, buffer[:size], pool) for size in SIZES}
        print(f"captured {len(steps)} CUDA graphs into one pool: M = {', '.join(map(str, SIZES))}")
    else:
        steps = {size: eager(layer, buffer[:size]) for size in SIZES}
        print("no CUDA graph: the steps run eagerly on the CPU")
    verb, good = "replayed" if device == "cuda" else "called", True
    for change in ("as captured", "other inputs", "weights updated in place", "other inputs again"):
        if "weights" in change:
            for weight in layer.parameters():
                weight.copy_(weight.flip(0))
        for size in SIZES:
            if "inputs" in change:
                buffer[:size].copy_(torch.randn(size, HIDDEN))
            replay, out = steps[size]
            replay()
            same = torch.equal(out, layer(buffer[:size]))
            good &= same
            print(f"{verb} M = {size}, {change}: {'equal to' if same else 'DIFFERENT from'} a call of its own")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
