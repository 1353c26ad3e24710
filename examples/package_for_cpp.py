"""Packages a block of router and experts with AOTInductor, for a process without Python: docs/cpp.md goes on from here.

python examples/package_for_cpp.py [--out FOLDER]  writes  block.pt2, inputs.pt, expected.pt

With `--device cuda` the block is a bfloat16 one for the GPU, and the command that compiles its kernels ahead of time is
shown.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import moe_ops
from moe_ops.aot.calls import call_text
from moe_ops.arguments import Arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("build/cpp"), help="folder of the files")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the package runs")


class Block(nn.Module):
    """Norm, router and experts, with a residual connection."""

    def __init__(self, hidden: int = 64, intermediate: int = 48, experts: int = 8, top_k: int = 2):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, intermediate) / intermediate**0.5)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed tokens [M, H], and weights and ids of their experts [M, top_k]."""
        normed = functional.rms_norm(x, x.shape[1:])
        weights, ids = self.router(normed).softmax(-1).topk(self.top_k)
        return normed, weights, ids

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        normed, weights, ids = self.routed(x)
        return x + moe_ops.fused_moe(normed, self.w1, self.w2, weights, ids)


@torch.no_grad()
def main() -> None:
    """Entry point."""
    options = parser.parse_args()
    out, device = options.out, options.device
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    block = Block().eval().to(device, dtype)

    def draw(num_tokens: int) -> Tensor:
        return torch.randn(num_tokens, 64).to(device, dtype)

    tokens = torch.export.Dim("tokens", min=1, max=65536)
    program = torch.export.export(block, (draw(8),), dynamic_shapes=({0: tokens},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(out / "block.pt2"))
    inputs = draw(5)
    # On a GPU by the package: fused, its router rounds less often than the module's, and might choose other experts.
    expected = block(inputs) if device == "cpu" else torch._inductor.aoti_load_package(package)(inputs)
    torch.save([inputs], out / "inputs.pt")
    torch.save([expected], out / "expected.pt")
    print(f"wrote {package}, inputs.pt and expected.pt: {list(expected.shape)}, sum {expected.double().sum():.6f}")
    if device == "cuda":
        normed, weights, ids = block.routed(inputs)
        text = call_text(Arguments(normed, block.w1, block.w2, weights, ids))
        print(f"now: python -m moe_ops aot --shapes '{text}' --out {out}")


if __name__ == "__main__":
    main()
