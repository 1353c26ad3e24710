"""Launches of the matrix-vector kernels: one token, without a sort, in two launches on every GPU path."""

from torch import Tensor

from moe_ops.backends.launch import (
    Launcher,
    activation_constexprs,
    bias_and_stride,
    cdiv,
    dependent,
    format_constexprs,
    next_power_of_2,
    result_launch,
    stored_weight,
    unit,
    weight_constexprs,
    weight_scales,
)
from moe_ops.backends.quantize import given_rows
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import Plan
from moe_ops.kernels import gemv as kernels
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import TOKEN_ROUTES


def up(args: Arguments, problem: Problem, plan: Plan, ids: Tensor, expert_map: Tensor | None, router_weights: Tensor,
       act: Tensor) -> None:  # fmt: skip
    """act[r] = act(w1[e] @ x[token of r] (* router weight) + b1[e]) for the routes r that are not dropped.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "direct".
        ids: [M, top_k], contiguous.
        expert_map: contiguous.
        router_weights: [M, top_k], contiguous.
        act: [M * top_k, I]; written.
    """
    config, x, w1 = plan.up, args.hidden_states, stored_weight(args.w1, problem, plan)
    bias, stride_be = bias_and_stride(args.w1_bias)
    scaled = given_rows(x, args.a1_scale) if problem.scheme.inputs_given else ScaledRows(x)
    Launcher(plan.kernels)(
        "up", kernels.gemv_up_kernel, problem.num_routes * cdiv(problem.intermediate_size, config.block_n),
        (x, w1, bias, router_weights if problem.router_weight_on_input else None, act, ids, expert_map,
         problem.num_routes, problem.num_ids, problem.num_experts, problem.top_k,
         problem.hidden_size, problem.intermediate_size, problem.alpha or 0.0, problem.limit or 0.0,
         *x.stride(), *w1.stride(), stride_be, act.stride(0),
         scaled.scale, scaled.stride_row, scaled.stride_group, *weight_scales(args, problem, "w1")),
        lambda: {
            **activation_constexprs(problem),
            "H_UNIT": unit(problem.hidden_size), "X_UNIT": unit(x.stride(0)), **weight_constexprs(w1),
            **_reduction(problem, plan, w1, config.block_k), "BLOCK_N": config.block_n,
            "num_warps": config.num_warps, **dependent(plan, follows=False),
        },
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, ids: Tensor, expert_map: Tensor | None, act: Tensor,
         router_weights: Tensor | None, out: Tensor) -> None:  # fmt: skip
    """out[m] = factor * sum_k weight[m, k] * (w2[e] @ act[r] + b2[e]), or the summands with `reduce_topk=False`.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "direct".
        ids: [M, top_k], contiguous.
        expert_map: contiguous.
        act: [M * top_k, I], what `up` wrote.
        router_weights: [M, top_k], contiguous; None for weights of 1.
        out: of `problem.out_shape`, any strides; written.
    """
    config, w2 = plan.down, stored_weight(args.w2, problem, plan)
    bias, stride_be = bias_and_stride(args.w2_bias)
    name, out_strides = result_launch("down", out, problem.reduce_topk)
    Launcher(plan.kernels)(
        name, kernels.gemv_down_kernel, problem.num_tokens * cdiv(problem.hidden_size, config.block_n),
        (act, w2, bias, router_weights, out, ids, expert_map,
         problem.routed_scaling_factor, problem.num_ids, problem.num_experts, problem.top_k,
         problem.hidden_size, problem.intermediate_size,
         act.stride(0), *w2.stride(), stride_be, *out_strides, *weight_scales(args, problem, "w2")),
        lambda: {
            "I_UNIT": unit(problem.intermediate_size), **weight_constexprs(w2),
            **_reduction(problem, plan, w2, config.block_k),
            "SLOTS": min(TOKEN_ROUTES, next_power_of_2(problem.top_k)), "REDUCE": problem.reduce_topk,
            "BLOCK_N": config.block_n, "num_warps": config.num_warps, **dependent(plan),
        },
    )  # fmt: skip


def _reduction(problem: Problem, plan: Plan, weight: Tensor, block_k: int) -> dict[str, object]:
    """Steps along K, in what is stored and read at once, and the format. A tile's steps are in what is stored."""
    block_k = block_k * problem.scheme.planes // plan.planes
    return {
        "EVEN_K": weight.shape[2] % block_k == 0, "BLOCK_K": block_k, "PLANES": plan.planes,
        **format_constexprs(problem),
    }  # fmt: skip
