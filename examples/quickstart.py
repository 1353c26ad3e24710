"""One call of the op, how it ran, and how far it is from the definition in float64."""

import torch

import moe_ops
from moe_ops.problem import Arguments
from moe_ops.reference import fused_moe_reference

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
tokens, hidden, intermediate, experts, top_k = 64, 512, 256, 8, 2
torch.manual_seed(0)
x = torch.randn(tokens, hidden, device=device, dtype=dtype)
w1 = torch.randn(experts, 2 * intermediate, hidden, device=device, dtype=dtype) / hidden**0.5
w2 = torch.randn(experts, hidden, intermediate, device=device, dtype=dtype) / intermediate**0.5
topk_weights, topk_ids = torch.randn(tokens, experts, device=device).softmax(-1).topk(top_k)

out = moe_ops.fused_moe(x, w1, w2, topk_weights, topk_ids, activation="silu")
plan = moe_ops.explain(x, w1, w2, topk_weights, topk_ids, activation="silu")
expected = fused_moe_reference(Arguments(x, w1, w2, topk_weights, topk_ids, activation="silu"))
error = ((out - expected).abs().max() / expected.abs().max()).item()

print(f"result: {list(out.shape)} {out.dtype} on {out.device}")
print(f"path: {plan.path} ({plan.reason})")
print(f"error against the reference: {error:.1e} of the largest value")
assert error < (1e-5 if dtype == torch.float32 else 2e-2)
