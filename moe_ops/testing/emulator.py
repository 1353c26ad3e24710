"""The op with its declared roundings and nothing else: what a right kernel's error looks like."""

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.problem import Problem, make_problem
from moe_ops.quantization import dequantize_activations, quantize_activations
from moe_ops.reference import activate, expert_weight, local_experts


def emulate(args: Arguments, *, round_up_projection: bool = False) -> Tensor:
    """Computes a call with the op's declared rounding points.

    Rounded to the compute dtype: the activation, each route's down output, and dequantised weights that have a scale
    for a group of columns. Rounded to fp8 or int8, where the format says so: hidden states, and the rounded activation.
    Rounded to the dtype of the result: the result. 16-bit products are summed in float64, whose error does not show
    beside these roundings; float32 products are summed in float32, one by one in order, the least accurate order a
    kernel may choose.

    Args:
        args: the call.
        round_up_projection: round the up projection as well, as the CPU path may in 16 bits.

    Returns:
        The result, [M, H] or [M, top_k, H], in the dtype the op gives it.

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
    scheme = problem.scheme
    if args.a1_scale is not None and scheme.inputs_given:
        inputs = dequantize_activations(args.hidden_states, args.a1_scale, wide)
    elif scheme.row_dtype is not None:
        inputs = _quantized(args.hidden_states, scheme.row_dtype, scheme.inputs, args.a1_scale, wide)
    else:
        inputs = args.hidden_states.to(wide)
    for expert in range(problem.num_experts):
        mine = (experts == expert).nonzero().flatten()
        if mine.numel() == 0:
            continue
        up = _matmul(inputs[mine // problem.top_k], _weight(args, problem, "w1", expert, wide))
        if round_up_projection:
            up = up.to(dtype).to(wide)
        if problem.router_weight_on_input:
            up = up * router_weights[mine, None]
        if args.w1_bias is not None:
            up = up + args.w1_bias[expert].to(wide)
        act = activate(up, problem).to(dtype).to(wide)
        if scheme.row_dtype is not None:
            scale = None if args.a2_scale is None else args.a2_scale[expert if scheme.act == "expert" else 0]
            act = _quantized(act, scheme.row_dtype, scheme.act, scale, wide)
        down = _matmul(act, _weight(args, problem, "w2", expert, wide))
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


def _quantized(x: Tensor, dtype: torch.dtype, granularity: str, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    """x rounded to the rows' format, as numbers."""
    q, scale = quantize_activations(x, dtype, granularity, scale)
    return dequantize_activations(q, scale, wide)


def _weight(args: Arguments, problem: Problem, which: str, expert: int, wide: torch.dtype) -> Tensor:
    """An expert's weights as a kernel multiplies them; scales of rows and blocks of fp8 and int8 come after."""
    weight = expert_weight(args, problem, which, expert, wide)
    if problem.scheme.scale_columns and problem.scheme.row_dtype is None:
        weight = weight.to(problem.dtype).to(wide)
    return weight


def _matmul(a: Tensor, weight: Tensor) -> Tensor:
    """a @ weight^T; in float32 with one rounding per product, in order."""
    if a.dtype == torch.float64:
        return a @ weight.T
    total = torch.zeros(a.shape[0], weight.shape[0], dtype=a.dtype, device=a.device)
    for k in range(a.shape[1]):
        total.addcmul_(a[:, k, None], weight[None, :, k])
    return total
