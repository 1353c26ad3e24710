"""A MoE block by hand from `torch.nn.functional.grouped_mm`: what plain PyTorch gives without a package."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moe_ops.arguments import Arguments


def prepare(args: Arguments) -> Callable[[], Tensor]:
    """Eager."""
    return lambda: grouped_mm(args)


def prepare_compiled(args: Arguments) -> Callable[[], Tensor]:
    """By torch.compile, for the call's own sizes."""
    # Code compiled for earlier cells counts towards the limit beyond which torch.compile silently runs eager.
    torch.compiler.reset()
    compiled = torch.compile(_block, fullgraph=True, dynamic=False)
    return lambda: compiled(*args.tensors().values())


def grouped_mm(args: Arguments) -> Tensor:
    """The block, without a host sync.

    Args:
        args: the call; unquantised, activation "silu", concatenated, ids in range.

    Returns:
        [M, H].
    """
    return _block(*args.tensors().values())


def _block(hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    num_experts, top_k = w1.shape[0], topk_ids.shape[1]
    experts = topk_ids.flatten()
    order = experts.argsort(stable=True)
    bounds = torch.arange(1, num_experts + 1, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts[order], bounds).int()
    rows = hidden_states[order // top_k]
    gate, up = functional.grouped_mm(rows, w1.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    rows = functional.grouped_mm(functional.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    routes = torch.empty_like(rows).index_copy_(0, order, rows).view(*topk_ids.shape, -1)
    return torch.bmm(topk_weights.to(rows.dtype).unsqueeze(1), routes).squeeze(1)
