"""The op with its declared roundings and nothing else: what a right kernel's error looks like."""

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.problem import make_problem
from moe_ops.reference import activate, local_experts


def emulate(args: Arguments, *, round_up_projection: bool = False) -> Tensor:
    """Computes a call with the op's declared rounding points.

    Rounded to the dtype of the operands: the activation, and each route's down output. Rounded to the dtype of the
    result: the result. 16-bit products are summed in float64, whose error does not show beside these roundings;
    float32 products are summed in float32, one by one in order, the least accurate order a kernel may choose.

    Args:
        args: the call; unquantised.
        round_up_projection: round the up projection as well, as the CPU path may in 16 bits.

    Returns:
        The result, in the dtype the op gives it.

    Raises:
        ValueError, TypeError: as the op.

    Example:
        >>> from moe_ops.testing import emulate, random_inputs
        >>> emulate(random_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2)).shape
        torch.Size([3, 16])
    """
    problem = make_problem(args)
    dtype = problem.dtype
    wide = torch.float32 if dtype == torch.float32 else torch.float64
    experts = local_experts(args.topk_ids, problem.num_experts, args.expert_map).flatten()
    router_weights = args.topk_weights.float().flatten()
    rows = torch.zeros(problem.num_routes, problem.hidden_size, dtype=dtype, device=experts.device)
    for expert in range(problem.num_experts):
        mine = (experts == expert).nonzero().flatten()
        if mine.numel() == 0:
            continue
        up = _matmul(args.hidden_states[mine // problem.top_k].to(wide), args.w1[expert].to(wide))
        if round_up_projection:
            up = up.to(dtype).to(wide)
        if problem.router_weight_on_input:
            up = up * router_weights[mine, None]
        if args.w1_bias is not None:
            up = up + args.w1_bias[expert].to(wide)
        act = activate(up, problem).to(dtype).to(wide)
        down = _matmul(act, args.w2[expert].to(wide))
        if args.w2_bias is not None:
            down = down + args.w2_bias[expert].to(wide)
        rows[mine] = down.to(dtype)
    routes = rows.view(*args.topk_ids.shape, -1).float()
    if not problem.router_weight_on_input:
        kept = (experts >= 0).view(*args.topk_ids.shape, 1)
        routes = torch.where(kept, routes * router_weights.view(*args.topk_ids.shape, 1), 0.0)
    if problem.reduce_topk:
        total = torch.zeros_like(routes[:, 0])
        for k in range(problem.top_k):
            total += routes[:, k]
        routes = total
    return (routes * problem.routed_scaling_factor).to(problem.out_dtype)


def _matmul(a: Tensor, weight: Tensor) -> Tensor:
    """a @ weight^T; in float32 with one rounding per product, in order."""
    if a.dtype == torch.float64:
        return a @ weight.T
    total = torch.zeros(a.shape[0], weight.shape[0], dtype=a.dtype, device=a.device)
    for k in range(a.shape[1]):
        total.addcmul_(a[:, k, None], weight[None, :, k])
    return total
