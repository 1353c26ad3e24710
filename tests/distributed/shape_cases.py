"""What each rank runs of published models' shapes: tokens of decode and of prefill, by the rule of one device."""

import torch

from moe_ops.arguments import Arguments
from moe_ops.distributed import ExpertParallel
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import assert_correct
from tests.distributed.calls import Cases

CASES = Cases()
# (E, top_k, H, I) of the published configurations.
QWEN3_30B, DEEPSEEK_V3 = (128, 8, 2048, 768), (256, 8, 7168, 2048)
TOKENS, CHECKED = (1, 64, 1024, 4096), 24


def _weights(me, sizes, form):
    """Weights of all experts, the same on every rank; as arguments of the op."""
    experts, _, hidden, intermediate = sizes
    generator, made = torch.Generator(me.device).manual_seed(0), {}
    for name, rows, columns in (("w1", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
        quantized = form == "fp8_block"
        dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
        made[name] = torch.empty(experts, rows, columns, dtype=dtype, device=me.device)
        for weight in made[name]:
            drawn = torch.randn(rows, columns, dtype=torch.bfloat16, device=me.device, generator=generator)
            weight.copy_(drawn if quantized else drawn.mul_(columns**-0.5))
        if quantized:
            blocks = experts, -(-rows // 128), -(-columns // 128)
            scale = torch.rand(blocks, device=me.device, generator=generator) + 0.5
            made[f"{name}_scale"] = scale * columns**-0.5
    return made


def _check(me, sizes, form):
    experts, top_k, hidden, _ = sizes
    whole = _weights(me, sizes, form)
    named = {"quantization": "fp8_w8a8", "block_shape": (128, 128)} if form == "fp8_block" else {}
    for tokens in TOKENS:
        options = {"device": me.device, "generator": torch.Generator(me.device).manual_seed(tokens + me.rank)}
        x = torch.randn(tokens, hidden, **options).bfloat16()
        ids = torch.rand(tokens, experts, **options).topk(top_k).indices
        topk_weights = torch.rand(tokens, top_k, **options).softmax(1)
        some = torch.arange(0, tokens, -(-tokens // CHECKED), device=me.device)
        args = Arguments(x[some], topk_weights=topk_weights[some], topk_ids=ids[some], **whole, **named)
        reference = fused_moe_reference(args)
        for choice in (
            {"way": "gather", "max_tokens": tokens},
            {"way": "gather", "max_tokens": tokens, "combine_dtype": torch.float32},
            {"way": "alltoall", "max_tokens": tokens},
            {"way": "alltoall"},
        ):
            ep = ExpertParallel(None, experts, **choice)
            first, last = ep.local_experts[0], ep.local_experts[-1] + 1
            mine = {name: weight[first:last] for name, weight in whole.items()}
            outs = [ep.fused_moe(x, topk_weights=topk_weights, topk_ids=ids, **mine, **named) for _ in range(2)]
            assert torch.equal(*outs), (tokens, choice)
            assert_correct(outs[0][some], args, reference=reference)


@CASES
def qwen3_30b(me):
    _check(me, QWEN3_30B, "bf16")


@CASES
def qwen3_30b_fp8(me):
    _check(me, QWEN3_30B, "fp8_block")


@CASES
def deepseek_v3(me):
    _check(me, DEEPSEEK_V3, "bf16")


@CASES
def deepseek_v3_fp8(me):
    _check(me, DEEPSEEK_V3, "fp8_block")
