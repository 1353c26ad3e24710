"""The chain of launches that the Triton paths share: route, up GEMM, down GEMM, combine."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_ops.backends import gemv
from moe_ops.backends.launch import (
    Launcher,
    bias_and_stride,
    dependent,
    on_device,
    result_launch,
    unit,
    weight_constexprs,
)
from moe_ops.backends.routing import sort_routes
from moe_ops.dispatch import Plan, row_stride
from moe_ops.kernels.combine import combine_kernel
from moe_ops.kernels.grouped_gemm import down_kernel, up_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import Routing

_COMBINE_UNROLL = 8
_COMBINE_COLUMNS = 1024


@dataclass(frozen=True)
class Operands:
    """How the GEMMs reach their operands: a descriptor where there is one, the tensor itself otherwise."""

    w1_desc: object | None
    w2_desc: object | None
    act_desc: object | None


def run(args: Arguments, problem: Problem, plan: Plan, out: Tensor, describe_operands) -> Tensor:
    """Runs a call on a Triton path.

    Args:
        args: the call.
        problem: its description.
        plan: path and tiles.
        out: the result, of `problem.out_shape`, any strides; written.
        describe_operands: (args, problem, plan, act) -> Operands, the path's own part.

    Returns:
        out.
    """
    for _ in stages(args, problem, plan, out, describe_operands):
        pass
    return out


def stages(args: Arguments, problem: Problem, plan: Plan, out: Tensor, describe_operands) -> Iterator[str]:
    """`run` in steps: launches one stage at a time and yields its name ("route", "up", "down" or "combine")."""
    hidden_states = args.hidden_states
    with on_device(hidden_states):
        router_weights = args.topk_weights.contiguous()
        combine_weights = None if problem.router_weight_on_input else router_weights
        act = _workspace(hidden_states, plan.max_rows, problem.intermediate_size)
        if plan.variant == "direct":
            ids = args.topk_ids.contiguous()
            expert_map = None if args.expert_map is None else args.expert_map.contiguous()
            gemv.up(args, problem, plan, ids, expert_map, router_weights, act)
            yield "up"
            gemv.down(args, problem, plan, ids, expert_map, act, combine_weights, out)
            yield "down"
            return
        routing = sort_routes(
            args.topk_ids, problem.num_experts, plan.block_m, args.expert_map, Launcher(plan.kernels),
            plan.dependent_launch,
        )  # fmt: skip
        yield "route"
        rows = _workspace(hidden_states, plan.max_rows, problem.hidden_size)
        if plan.variant == "pingpong":
            from moe_ops.backends import pingpong

            pingpong.up(args, problem, plan, routing, router_weights, act)
            yield "up"
            pingpong.down(args, problem, plan, routing, act, rows)
        else:
            operands = describe_operands(args, problem, plan, act)
            _up(args, problem, plan, operands, routing, router_weights, act)
            yield "up"
            _down(args, problem, plan, operands, routing, act, rows)
        yield "down"
        _combine(problem, plan, rows, routing, combine_weights, out)
        yield "combine"


def _workspace(like: Tensor, num_rows: int, columns: int) -> Tensor:
    """[num_rows, columns] whose rows TMA can step over."""
    return like.new_empty((num_rows, row_stride(columns)))[:, :columns]


def _up(args, problem: Problem, plan: Plan, operands: Operands, routing: Routing, router_weights, act) -> None:
    config, activation, w1 = plan.up, problem.activation, args.w1
    bias, stride_be = bias_and_stride(args.w1_bias)
    Launcher(plan.kernels)(
        "up", up_kernel, plan.max_tiles * triton.cdiv(problem.intermediate_size, config.block_n),
        (args.hidden_states, operands.w1_desc, None if operands.w1_desc is not None else w1, bias,
         router_weights if problem.router_weight_on_input else None, act, *routing[:2],
         problem.num_routes, problem.top_k,
         problem.hidden_size, problem.intermediate_size, problem.alpha or 0.0, problem.limit or 0.0,
         *args.hidden_states.stride(), *problem.w1_strides, stride_be, act.stride(0)),
        lambda: {
            "ACTIVATION": activation.name, "GATED": activation.gated,
            "INTERLEAVED": problem.gate_up_layout == "interleaved", "HAS_LIMIT": problem.limit is not None,
            "X_UNIT": unit(args.hidden_states.stride(0)), **weight_constexprs(w1), **_sizes(problem),
            **_tile(plan, config, problem.hidden_size, w1.dtype), **dependent(plan),
        },
    )  # fmt: skip


def _down(args, problem: Problem, plan: Plan, operands: Operands, routing: Routing, act: Tensor, rows) -> None:
    config, w2 = plan.down, args.w2
    bias, stride_be = bias_and_stride(args.w2_bias)
    Launcher(plan.kernels)(
        "down", down_kernel, plan.max_tiles * triton.cdiv(problem.hidden_size, config.block_n),
        (operands.act_desc, act, operands.w2_desc, None if operands.w2_desc is not None else w2, bias, rows,
         *routing[:2], problem.num_routes,
         problem.hidden_size, problem.intermediate_size,
         act.stride(0), *problem.w2_strides, stride_be, rows.stride(0)),
        lambda: {
            **weight_constexprs(w2), **_sizes(problem), **_tile(plan, config, problem.intermediate_size, w2.dtype),
            **dependent(plan),
        },
    )  # fmt: skip


def _sizes(problem: Problem) -> dict[str, int]:
    return {"H_UNIT": unit(problem.hidden_size), "I_UNIT": unit(problem.intermediate_size)}


def _tile(plan: Plan, config, reduction: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "EVEN_K": reduction % config.block_k == 0,
        "PRECISION": "ieee" if dtype == torch.float32 else None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SWAP_AB": config.swap_ab,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _combine(problem: Problem, plan: Plan, rows: Tensor, routing: Routing, router_weights, out: Tensor) -> None:
    """out[m] = factor * sum_k weight[m, k] * rows[inverse[m, k]]; the summands with `reduce_topk=False`."""
    block_h = min(_COMBINE_COLUMNS, triton.next_power_of_2(problem.hidden_size))
    name, out_strides = result_launch("combine", out, problem.reduce_topk)
    Launcher(plan.kernels)(
        name, combine_kernel, problem.num_tokens * triton.cdiv(problem.hidden_size, block_h),
        (rows, routing.inverse, router_weights, out,
         problem.routed_scaling_factor, problem.top_k, problem.hidden_size,
         rows.stride(0), *out_strides),
        lambda: {
            "UNROLL": min(_COMBINE_UNROLL, triton.next_power_of_2(problem.top_k)), "REDUCE": problem.reduce_topk,
            "BLOCK_H": block_h, "num_warps": 4, **dependent(plan),
        },
    )  # fmt: skip
