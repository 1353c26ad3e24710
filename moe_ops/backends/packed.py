"""Launches of the kernels for packed weights and few rows an expert: descriptors, constexprs and grids, on Hopper.

They take the place of the pipeline's own two GEMMs where `tuning.variants.packed_obstacle` sees none; the rows are in
planes, as there.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops.backends import pingpong
from moe_ops.backends.launch import (
    Launcher,
    activation_constexprs,
    bias_and_stride,
    cdiv,
    dependent,
    format_constexprs,
    stored_weight,
    weight_scales,
)
from moe_ops.dispatch import Plan
from moe_ops.kernels.packed import packed_down_kernel, packed_up_kernel
from moe_ops.kernels.packed_ring import STEP
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import Routing

# Rows of a side of w1 that lie together in a stage.
_SIDE = 8
# Rows up to which a program may have several tiles.
_ROWS_OF_MANY_TILES = 16
# Registers of a thread when a program of 8 warps starts, by how many of them share a multiprocessor. Those who fill the
# stages give theirs up to those who multiply.
_REGISTERS = {4: 64, 3: 80, 2: 128, 1: 168}
# With zero points a program needs more.
_REGISTERS_ZERO = 80


def up(args: Arguments, problem: Problem, plan: Plan, routing: Routing, router_weights: Tensor, x: Tensor,
       act: Tensor) -> None:  # fmt: skip
    """act[p] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "packed".
        routing: the sorted routes, blocks of `plan.block_m`.
        router_weights: [M, top_k], contiguous.
        x: the hidden states in planes, from `backends.planes`.
        act: [max_rows, planes, width], in planes; written but for padding rows.
    """
    config, w1 = plan.up, stored_weight(args.w1, problem, plan)
    bias, stride_be = bias_and_stride(args.w1_bias)
    Launcher(plan.kernels)(
        "up", packed_up_kernel,
        _programs(problem, plan, config, cdiv(problem.intermediate_size, config.block_n)),
        (x, _w1_descriptor(w1, problem, config.block_n), bias,
         router_weights if problem.router_weight_on_input else None, act, *routing[:2], plan.max_tiles,
         problem.num_routes, problem.alpha or 0.0, problem.limit or 0.0, x.stride(0), stride_be, act.stride(0),
         *weight_scales(args, problem, "w1")),
        lambda: {
            "N": problem.intermediate_size, "K": problem.hidden_size, "TOP_K": problem.top_k,
            **activation_constexprs(problem), **_constexprs(problem, config, args.w1_zero_point), **dependent(plan),
        },
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, routing: Routing, act: Tensor, rows: Tensor) -> None:
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p, or parts of it (`plan.splits`).

    Args:
        args: the call.
        problem: its description.
        plan: of variant "packed".
        routing: the sorted routes, blocks of `plan.block_m`.
        act: [max_rows, planes, width], what `up` wrote.
        rows: [splits * max_rows, H]; written but for padding rows.
    """
    config, w2 = plan.down, stored_weight(args.w2, problem, plan)
    bias, stride_be = bias_and_stride(args.w2_bias)
    Launcher(plan.kernels)(
        "down", packed_down_kernel,
        _programs(problem, plan, config, cdiv(problem.hidden_size, config.block_n) * plan.splits),
        (act, pingpong.descriptor(w2, [1, config.block_n, STEP.value]), bias, rows, *routing[:2], plan.max_tiles,
         problem.num_routes,
         plan.max_rows, act.stride(0), stride_be, rows.stride(0), *weight_scales(args, problem, "w2")),
        lambda: {
            "N": problem.hidden_size, "K": problem.intermediate_size,
            **_constexprs(problem, config, args.w2_zero_point), "SPLITS": plan.splits, **dependent(plan),
        },
    )  # fmt: skip


def _programs(problem: Problem, plan: Plan, config, columns: int) -> int:
    """Programs for `columns` tiles of each row block; where one may have several, the first ones take what is left.

    Those of row blocks that there are not hold up the next launch. So there are as many as experts can be expected to
    meet at least, E * R / (E + R) of R routes, but enough to keep the device busy twice over.
    """
    if _one_tile(config):
        return plan.max_tiles * columns
    experts, routes = problem.num_experts, problem.num_routes
    busy = cdiv(2 * config.packed_programs() * plan.num_sms, columns)
    return min(plan.max_tiles, max(experts * routes // (experts + routes), busy)) * columns


def _one_tile(config) -> bool:
    """Whether a program has one tile: with 32 rows it is slower where it may have more, even if it has not."""
    return config.block_m > _ROWS_OF_MANY_TILES


def _w1_descriptor(w1: Tensor, problem: Problem, columns: int) -> TensorDescriptor:
    """w1 in boxes that make so many columns of act: 8 rows of the gate, the 8 of up that belong to them, and so on."""
    if not problem.activation.gated:
        return pingpong.descriptor(w1, [1, columns, STEP.value])
    sides = (w1.shape[0], problem.intermediate_size // _SIDE, 2, _SIDE, w1.shape[2])
    stride_e, stride_n, stride_k = w1.stride()
    if problem.gate_up_layout == "interleaved":
        strides = (stride_e, 2 * _SIDE * stride_n, stride_n, 2 * stride_n, stride_k)
    else:
        strides = (stride_e, _SIDE * stride_n, problem.intermediate_size * stride_n, stride_n, stride_k)
    return pingpong.descriptor(w1, [1, columns // _SIDE, 2, _SIDE, STEP.value], sides, strides)


def _constexprs(problem: Problem, config, zero_point: Tensor | None) -> dict[str, object]:
    form = format_constexprs(problem)
    return {
        "FORMAT": form["FORMAT"], "SCALE_COLUMNS": form["SCALE_COLUMNS"], "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "GROUP_M": config.group_m, "STAGES": config.num_stages,
        "ONE_TILE": _one_tile(config), "PROXY_FENCE": pingpong.PROXY_FENCE, "num_warps": config.num_warps,
        "maxnreg": max(_REGISTERS[config.packed_programs()], 0 if zero_point is None else _REGISTERS_ZERO),
    }  # fmt: skip
