"""What `fused_moe_tma` means, in plain torch: the oracle of the tests and `path="reference"`.

    out[m] = factor * sum_k topk_weights[m, k] * (act(x[m] @ w1[e]^T + b1[e]) @ w2[e]^T + b2[e]),   e = topk_ids[m, k]

It favours being obviously right over speed: one loop over the experts, everything in one wide dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_ops.activations import Activation
from moe_ops.arguments import Arguments
from moe_ops.problem import Problem, make_problem
from moe_ops.quantization import dequantize, dequantize_activations


def fused_moe_reference(args: Arguments, dtype: torch.dtype = torch.float64) -> Tensor:
    """Computes a call in `dtype`, without any rounding to the inputs' own dtype.

    Quantised tensors are what they stand for; nothing that arrives in 16 bits is quantised.

    Args:
        args: the call. Any device.
        dtype: torch.float64 or torch.float32.

    Returns:
        The result in `dtype`: [M, H], or [M, top_k, H] with `reduce_topk=False`.

    Raises:
        ValueError, TypeError: as the op.

    Example:
        >>> import torch
        >>> from moe_ops.arguments import Arguments
        >>> x, ids, weights = torch.randn(3, 8), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
        >>> fused_moe_reference(Arguments(x, torch.randn(2, 8, 8), torch.randn(2, 8, 4), weights, ids)).shape
        torch.Size([3, 8])
    """
    problem = make_problem(args)
    experts = local_experts(args.topk_ids, problem.num_experts, args.expert_map).flatten()
    tokens = torch.arange(problem.num_tokens, device=experts.device).repeat_interleave(problem.top_k)
    router_weights = args.topk_weights.to(dtype).flatten()
    routes = torch.zeros(problem.num_routes, problem.hidden_size, dtype=dtype, device=experts.device)
    inputs = args.hidden_states
    if args.a1_scale is not None and problem.scheme.inputs_given:
        inputs = dequantize_activations(inputs, args.a1_scale, dtype)
    for expert in range(problem.num_experts):
        mine = (experts == expert).nonzero().flatten()
        if mine.numel() == 0:
            continue
        up = inputs[tokens[mine]].to(dtype) @ expert_weight(args, problem, "w1", expert, dtype).T
        if problem.router_weight_on_input:
            up = up * router_weights[mine, None]
        if args.w1_bias is not None:
            up = up + args.w1_bias[expert].to(dtype)
        down = activate(up, problem) @ expert_weight(args, problem, "w2", expert, dtype).T
        if args.w2_bias is not None:
            down = down + args.w2_bias[expert].to(dtype)
        if not problem.router_weight_on_input:
            down = down * router_weights[mine, None]
        routes[mine] = down * problem.routed_scaling_factor
    routes = routes.view(problem.num_tokens, problem.top_k, problem.hidden_size)
    return routes.sum(1) if problem.reduce_topk else routes


def expert_weight(args: Arguments, problem: Problem, which: str, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's weights as numbers.

    Args:
        args: the call.
        problem: its description.
        which: "w1" or "w2".
        expert: which of them.
        dtype: of the result.

    Returns:
        [N, K] in `dtype`.
    """
    weight, scheme = getattr(args, which)[expert], problem.scheme
    if not scheme.quantized:
        return weight.to(dtype)
    zero_point = getattr(args, f"{which}_zero_point")
    return dequantize(
        weight, getattr(args, f"{which}_scale")[expert], scheme.name,
        block_shape=(scheme.scale_rows, scheme.scale_columns) if scheme.scale_columns else None,
        zero_point=None if zero_point is None else zero_point[expert], dtype=dtype,
    )  # fmt: skip


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """Maps ids to the experts whose weights are here.

    Args:
        topk_ids: int32 or int64, any values.
        num_experts: E.
        expert_map: int32 [E_global] or None: the local expert of each global one.

    Returns:
        int64, shaped as `topk_ids`: 0 to E - 1, or -1 for a route that is dropped.
    """
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        if expert_map.shape[0] == 0:
            return torch.full_like(ids, -1)
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def split_gate_up(up: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """[..., 2 * I] -> gate [..., I] and up [..., I], by `gate_up_layout`."""
    if layout == "interleaved":
        return up[..., ::2], up[..., 1::2]
    gate, up = up.chunk(2, dim=-1)
    return gate, up


def activate(up: Tensor, problem: Problem) -> Tensor:
    """The activation of the up projection's output: [..., rows of w1] -> [..., I], in the dtype of `up`."""
    activation = problem.activation
    if not activation.gated:
        return nonlinearity(up, activation, problem.alpha)
    gate, up = split_gate_up(up, problem.gate_up_layout)
    if problem.limit is not None:
        gate, up = gate.clamp(max=problem.limit), up.clamp(-problem.limit, problem.limit)
    if activation.name == "swigluoai":
        up = up + 1
    return nonlinearity(gate, activation, problem.alpha) * up


def nonlinearity(gate: Tensor, activation: Activation, alpha: float | None) -> Tensor:
    """The pointwise function of an activation, before gate and up are multiplied."""
    match activation.name.removesuffix("_no_gate"):
        case "silu":
            return functional.silu(gate)
        case "gelu":
            return functional.gelu(gate)
        case "gelu_tanh":
            return functional.gelu(gate, approximate="tanh")
        case "swigluoai" if alpha is not None:
            return gate * torch.sigmoid(alpha * gate)
        case "relu2":
            return functional.relu(gate).square()
    raise ValueError(f"activation {activation.name!r} has no definition")
