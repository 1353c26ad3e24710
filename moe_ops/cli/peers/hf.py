"""The experts implementations of Hugging Face transformers, on a real experts module that holds the call's weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_ops.arguments import Arguments


def prepare(args: Arguments, implementation: str) -> Callable[[], Tensor]:
    """Readies a Qwen3-MoE experts module with `experts_implementation`; ids and router weights as its router gives."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, intermediate = args.w2.shape
    config = Qwen3MoeConfig(
        num_experts=experts,
        num_experts_per_tok=args.topk_ids.shape[1],
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.config._experts_implementation = implementation
    module.gate_up_proj = nn.Parameter(args.w1, requires_grad=False)
    module.down_proj = nn.Parameter(args.w2, requires_grad=False)
    x, ids, weights = args.hidden_states, args.topk_ids.long(), args.topk_weights.to(args.hidden_states.dtype)
    return lambda: module(x, ids, weights)
