"""The CPU backend: torch only; tokens grouped by expert, one pair of matrix products per expert that has any."""

import torch
from torch import Tensor

from moe_ops.problem import Arguments, Problem
from moe_ops.reference import activate, local_experts
from moe_ops.routing import Routing, empty_routing


def run(args: Arguments, problem: Problem, out: Tensor) -> Tensor:
    """Runs a call on the CPU.

    Args:
        args: the call.
        problem: its description.
        out: the result, of `problem.out_shape`, any strides; written.

    Returns:
        out.
    """
    top_k = problem.top_k
    experts = local_experts(args.topk_ids, problem.num_experts, args.expert_map).flatten()
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts + 1, minlength=problem.num_experts + 1).tolist()
    router_weights = args.topk_weights.float().flatten()
    rows = torch.empty(problem.num_routes, problem.hidden_size, dtype=problem.dtype)
    first = counts[0]
    rows[order[:first]] = 0
    router_weights = router_weights.index_fill(0, order[:first], 0.0)
    for expert, count in enumerate(counts[1:]):
        if count == 0:
            continue
        mine = order[first : first + count]
        first += count
        up = args.hidden_states[mine // top_k] @ args.w1[expert].T
        if problem.router_weight_on_input or args.w1_bias is not None:
            up = up.float()
            if problem.router_weight_on_input:
                up *= router_weights[mine, None]
            if args.w1_bias is not None:
                up += args.w1_bias[expert].float()
        act = activate(up.float(), problem).to(problem.dtype)
        down = act @ args.w2[expert].T
        if args.w2_bias is not None:
            down = (down.float() + args.w2_bias[expert].float()).to(problem.dtype)
        rows[mine] = down
    routes = rows.view(problem.num_tokens, top_k, -1).float()
    if not problem.router_weight_on_input:
        routes *= router_weights.view(problem.num_tokens, top_k, 1)
    routes *= problem.routed_scaling_factor
    return out.copy_(routes.sum(1) if problem.reduce_topk else routes)


def sort_routes(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    """Sorts the routes of `topk_ids` [M, top_k] by expert; see `moe_ops.route`."""
    routing = empty_routing(topk_ids, num_experts, block)
    num_routes = routing.inverse.numel()
    experts = local_experts(topk_ids, num_experts, expert_map).flatten()
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts + 1, minlength=num_experts + 1)
    order, counts = order[counts[0] :], counts[1:]
    padded = (counts + block - 1) // block * block
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(order.numel()) + shift[experts[order]]
    routing.sorted_routes.fill_(num_routes)[rows] = order.int()
    routing.inverse.fill_(-1)[order] = rows.int()
    tiles = torch.arange(num_experts).repeat_interleave(padded // block)
    routing.tile_experts.fill_(-1)[: tiles.numel()] = tiles.int()
    routing.num_padded.fill_(padded.sum())
    return routing
