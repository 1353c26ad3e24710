"""The chain of launches that the Triton paths share: route, up GEMM, down GEMM, combine."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.backends import gemv, planes, quantize
from moe_ops.backends.launch import (
    Launcher,
    activation_constexprs,
    bias_and_stride,
    cdiv,
    dependent,
    format_constexprs,
    next_power_of_2,
    on_device,
    result_launch,
    scale_unit,
    stored_weight,
    unit,
    weight_constexprs,
    weight_scales,
)
from moe_ops.backends.routing import sort_routes
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import Plan, row_stride
from moe_ops.kernels.combine import combine_kernel
from moe_ops.kernels.grouped_gemm import down_kernel, up_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import PROGRESS, Routing

_COMBINE_UNROLL = 8
_COMBINE_COLUMNS = 1024


class Describe(NamedTuple):
    """How a path describes its operands to TMA.

    Attributes:
        w1: (args, problem, plan) -> descriptor.
        w2: likewise.
        act: (act, plan) -> descriptor of the rows of the down GEMM.
    """

    w1: Callable[[Arguments, Problem, Plan], object]
    w2: Callable[[Arguments, Problem, Plan], object]
    act: Callable[[Tensor, Plan], object]


def run(args: Arguments, problem: Problem, plan: Plan, out: Tensor, describe: Describe | None) -> Tensor:
    """Runs a call on a Triton path.

    Args:
        args: the call.
        problem: its description.
        plan: path and tiles.
        out: the result, of `problem.out_shape`, any strides; written.
        describe: descriptors of the operands; None for a path that reaches all of them by pointers.

    Returns:
        out.
    """
    for _ in stages(args, problem, plan, out, describe):
        pass
    return out


def stages(args: Arguments, problem: Problem, plan: Plan, out: Tensor, describe: Describe | None) -> Iterator[str]:
    """`run` in steps: launches one stage at a time and yields its name.

    The names are "route", "quantize" and "planes" (of the hidden states), "up" (quantisation of its result included),
    "down" and "combine"; not every call has all of them.
    """
    with on_device(args.hidden_states):
        router_weights = args.topk_weights.contiguous()
        combine_weights = None if problem.router_weight_on_input else router_weights
        if plan.variant == "direct":
            ids = args.topk_ids.contiguous()
            expert_map = None if args.expert_map is None else args.expert_map.contiguous()
            act = _workspace(args, problem, plan, problem.intermediate_size)
            gemv.up(args, problem, plan, ids, expert_map, router_weights, act)
            yield "up"
            gemv.down(args, problem, plan, ids, expert_map, act, combine_weights, out)
            yield "down"
            return
        x = quantize.empty_inputs(args, problem)
        progress = args.topk_ids.new_empty(PROGRESS, dtype=torch.int32) if plan.persistent else None
        if plan.planes > 1 and plan.variant != "mixed":
            x = ScaledRows(planes.empty(x.values, *x.values.shape, plan))
        routing = sort_routes(
            args.topk_ids, problem.num_experts, plan.block_m, args.expert_map, Launcher(plan.kernels),
            plan.dependent_launch, progress,
        )  # fmt: skip
        yield "route"
        if problem.scheme.quantizes_inputs:
            quantize.inputs(args, problem, plan, x)
            yield "quantize"
        if plan.variant == "mixed":
            x = _scattered(args, problem, plan, routing)
            yield "planes"
        elif plan.planes > 1:
            planes.fill(args.hidden_states, x.values, plan)
            yield "planes"
        act = _UP[plan.variant](args, problem, plan, describe, routing, progress, router_weights, x)
        yield "up"
        rows = _workspace(args, problem, plan, problem.hidden_size, plan.splits)
        _DOWN[plan.variant](args, problem, plan, describe, routing, progress, act, rows)
        yield "down"
        _combine(problem, plan, rows, routing, combine_weights, out)
        yield "combine"


def _workspace(args: Arguments, problem: Problem, plan: Plan, columns: int, splits: int = 1) -> Tensor:
    """[max_rows, columns] in the compute dtype, whose rows TMA can step over; in fp32 for each of several splits."""
    stride = row_stride(columns)
    dtype = problem.dtype if splits == 1 else torch.float32
    rows = args.hidden_states.new_empty((splits * plan.max_rows, stride), dtype=dtype)
    return rows if stride == columns else rows[:, :columns]


def _up(args, problem: Problem, plan: Plan, describe: Describe | None, routing: Routing, _, router_weights,
        x: ScaledRows) -> ScaledRows:  # fmt: skip
    config, w1 = plan.up, stored_weight(args.w1, problem, plan)
    bias, stride_be = bias_and_stride(args.w1_bias)
    w1_desc = None if describe is None else describe.w1(args, problem, plan)
    if plan.planes > 1:
        act = planes.empty(x.values, plan.max_rows, problem.intermediate_size, plan)
    else:
        act = _workspace(args, problem, plan, problem.intermediate_size)
    Launcher(plan.kernels)(
        "up", up_kernel, plan.max_tiles * cdiv(problem.intermediate_size, config.block_n),
        (x.values, w1_desc, None if w1_desc is not None else w1, bias,
         router_weights if problem.router_weight_on_input else None, act, *routing[:2],
         problem.num_routes, problem.top_k,
         problem.hidden_size, problem.intermediate_size, problem.alpha or 0.0, problem.limit or 0.0,
         x.values.stride(0), x.values.stride(-1), *w1.stride(), stride_be, act.stride(0),
         x.scale, *x.strides, *weight_scales(args, problem, "w1")),
        lambda: {
            **activation_constexprs(problem),
            "X_UNIT": unit(x.values.stride(0)), **weight_constexprs(w1), **_sizes(problem),
            "S_UNIT": scale_unit(args.w1_scale),
            **_tile(plan, config, problem.hidden_size, problem), **dependent(plan),
        },
    )  # fmt: skip
    return quantize.activation(args, problem, plan, act, routing)


def _down(args, problem: Problem, plan: Plan, describe: Describe | None, routing: Routing, _, act: ScaledRows,
          rows: Tensor) -> None:  # fmt: skip
    config, w2 = plan.down, stored_weight(args.w2, problem, plan)
    bias, stride_be = bias_and_stride(args.w2_bias)
    # A box of each plane would bring whole row blocks, most of whose rows are padding where this matters.
    act_desc = None if describe is None or plan.planes > 1 else describe.act(act.values, plan)
    w2_desc = None if describe is None else describe.w2(args, problem, plan)
    Launcher(plan.kernels)(
        "down", down_kernel, plan.max_tiles * cdiv(problem.hidden_size, config.block_n) * plan.splits,
        (act_desc, act.values, w2_desc, None if w2_desc is not None else w2, bias, rows,
         *routing[:2], problem.num_routes,
         problem.hidden_size, problem.intermediate_size,
         act.values.stride(0), *w2.stride(), stride_be, rows.stride(0),
         act.scale, *act.strides, *weight_scales(args, problem, "w2")),
        lambda: {
            **weight_constexprs(w2), **_sizes(problem), "S_UNIT": scale_unit(args.w2_scale),
            **_tile(plan, config, problem.intermediate_size, problem), "SPLITS": plan.splits,
            **dependent(plan),
        },
    )  # fmt: skip


def _pingpong_up(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, router_weights,
                 x: ScaledRows) -> ScaledRows:  # fmt: skip
    from moe_ops.backends import pingpong

    if problem.scheme.act and args.a2_scale is not None:
        act = quantize.empty_act(args, problem, plan)
        pingpong.up(args, problem, plan, routing, progress[0], router_weights, x, act.values, act.scale)
        return act
    act = _workspace(args, problem, plan, problem.intermediate_size)
    pingpong.up(args, problem, plan, routing, progress[0], router_weights, x, act, None)
    return quantize.activation(args, problem, plan, act, routing)


def _pingpong_down(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, act: ScaledRows,
                   rows: Tensor) -> None:  # fmt: skip
    from moe_ops.backends import pingpong

    pingpong.down(args, problem, plan, routing, progress[1], act, rows)


def _blockscaled_up(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, router_weights,
                    x: ScaledRows) -> ScaledRows:  # fmt: skip
    from moe_ops.backends import blockscaled

    act = quantize.empty_act(args, problem, plan)
    blockscaled.up(args, problem, plan, routing, progress[0], router_weights, x, act)
    return act


def _blockscaled_down(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, act: ScaledRows,
                      rows: Tensor) -> None:  # fmt: skip
    from moe_ops.backends import blockscaled

    blockscaled.down(args, problem, plan, routing, progress[1], act, rows)


def _packed_up(args, problem: Problem, plan: Plan, _, routing: Routing, __, router_weights,
               x: ScaledRows) -> ScaledRows:  # fmt: skip
    from moe_ops.backends import packed

    act = planes.empty(x.values, plan.max_rows, problem.intermediate_size, plan)
    packed.up(args, problem, plan, routing, router_weights, x.values, act)
    return ScaledRows(act)


def _packed_down(args, problem: Problem, plan: Plan, _, routing: Routing, __, act: ScaledRows,
                 rows: Tensor) -> None:  # fmt: skip
    from moe_ops.backends import packed

    packed.down(args, problem, plan, routing, act.values, rows)


def _scattered(args, problem: Problem, plan: Plan, routing: Routing) -> ScaledRows:
    """The hidden states of the sorted rows, in planes."""
    from moe_ops.backends import mixed

    rows = mixed.empty(args.hidden_states, problem.hidden_size, problem, plan)
    mixed.scatter(args.hidden_states, rows, problem, plan, routing)
    return ScaledRows(rows)


def _mixed_up(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, router_weights,
              x: ScaledRows) -> ScaledRows:  # fmt: skip
    from moe_ops.backends import mixed

    act = mixed.empty(args.hidden_states, problem.intermediate_size, problem, plan)
    mixed.up(args, problem, plan, routing, progress[0], router_weights, x.values, act)
    return ScaledRows(act)


def _mixed_down(args, problem: Problem, plan: Plan, _, routing: Routing, progress: Tensor, act: ScaledRows,
                rows: Tensor) -> None:  # fmt: skip
    from moe_ops.backends import mixed

    mixed.down(args, problem, plan, routing, progress[1], act.values, rows)


# By variant; Gluon, which all but the first need, may be absent.
_UP = {
    "sorted": _up, "pingpong": _pingpong_up, "blockscaled": _blockscaled_up, "packed": _packed_up, "mixed": _mixed_up,
}  # fmt: skip
_DOWN = {
    "sorted": _down, "pingpong": _pingpong_down, "blockscaled": _blockscaled_down, "packed": _packed_down,
    "mixed": _mixed_down,
}  # fmt: skip


def _sizes(problem: Problem) -> dict[str, int]:
    return {"H_UNIT": unit(problem.hidden_size), "I_UNIT": unit(problem.intermediate_size)}


def _tile(plan: Plan, config, reduction: int, problem: Problem) -> dict[str, object]:
    return {
        **format_constexprs(problem),
        "EVEN_K": reduction % config.block_k == 0,
        "PRECISION": "ieee" if problem.dtype == torch.float32 else None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SWAP_AB": config.swap_ab,
        "PLANES": plan.planes,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _combine(problem: Problem, plan: Plan, rows: Tensor, routing: Routing, router_weights, out: Tensor) -> None:
    """out[m] = factor * sum_k weight[m, k] * rows[inverse[m, k]]; the summands with `reduce_topk=False`."""
    block_h = min(_COMBINE_COLUMNS, next_power_of_2(problem.hidden_size))
    name, out_strides = result_launch("combine", out, problem.reduce_topk)
    Launcher(plan.kernels)(
        name, combine_kernel, problem.num_tokens * cdiv(problem.hidden_size, block_h),
        (rows, routing.inverse, router_weights, out,
         problem.routed_scaling_factor, problem.top_k, problem.hidden_size,
         plan.max_rows, rows.stride(0), *out_strides),
        lambda: {
            "UNROLL": min(_COMBINE_UNROLL, next_power_of_2(problem.top_k)), "REDUCE": problem.reduce_topk,
            "SPLITS": plan.splits, "BLOCK_H": block_h, "num_warps": 4, **dependent(plan),
        },
    )  # fmt: skip
