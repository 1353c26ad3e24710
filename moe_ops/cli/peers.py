"""What the op is compared with."""

import torch
from torch import Tensor
from torch.nn import functional

from moe_ops.arguments import Arguments


def grouped_mm(args: Arguments) -> Tensor:
    """A gated silu MoE block composed by hand from `torch.nn.functional.grouped_mm`, without a host sync.

    Args:
        args: the call; unquantised, activation "silu", concatenated, ids in range.

    Returns:
        [M, H].
    """
    num_experts, top_k = args.w1.shape[0], args.topk_ids.shape[1]
    experts = args.topk_ids.flatten()
    order = experts.argsort(stable=True)
    bounds = torch.arange(1, num_experts + 1, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts[order], bounds).int()
    rows = args.hidden_states[order // top_k]
    gate, up = functional.grouped_mm(rows, args.w1.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    rows = functional.grouped_mm(functional.silu(gate) * up, args.w2.transpose(1, 2), offs=offsets)
    routes = torch.empty_like(rows).index_copy_(0, order, rows).view(*args.topk_ids.shape, -1)
    return torch.bmm(args.topk_weights.to(rows.dtype).unsqueeze(1), routes).squeeze(1)
