"""Packages a block of router and experts with AOTInductor, for a process without Python: docs/cpp.md goes on from here.

python examples/package_for_cpp.py [--out FOLDER]  writes  block.pt2, inputs.pt, expected.pt
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import moe_ops

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("build/cpp"), help="folder of the files")


class Block(nn.Module):
    """Norm, router and experts, with a residual connection."""

    def __init__(self, hidden: int = 64, intermediate: int = 48, experts: int = 8, top_k: int = 2):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, intermediate) / intermediate**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        normed = functional.rms_norm(x, x.shape[1:])
        weights, ids = self.router(normed).softmax(-1).topk(self.top_k)
        return x + moe_ops.fused_moe(normed, self.w1, self.w2, weights, ids)


def main() -> None:
    """Entry point."""
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = Block().eval()
    tokens = torch.export.Dim("tokens", min=1, max=65536)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(8, 64),), dynamic_shapes=({0: tokens},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(out / "block.pt2"))
        inputs = torch.randn(5, 64)
        expected = block(inputs)
    torch.save([inputs], out / "inputs.pt")
    torch.save([expected], out / "expected.pt")
    print(f"wrote {package}, inputs.pt and expected.pt: {list(expected.shape)}, sum {expected.double().sum():.6f}")


if __name__ == "__main__":
    main()
