"""Launches of the block-scaled kernel: descriptors, constexprs and grid of the up and the down GEMM on Hopper.

They take the place of the pipeline's own two GEMMs where `tuning.variants.blockscaled_obstacle` sees none; the row
block is 64, or 128 for many rows an expert.
"""

from torch import Tensor

from moe_ops.backends import pingpong
from moe_ops.backends.launch import Launcher, activation_constexprs, bias_and_stride, cdiv
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import Plan
from moe_ops.kernels.blockscaled import blockscaled_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.quantization.scheme import GROUP
from moe_ops.routing import Routing

# Rows of a box: what a consumer multiplies.
_ROWS = 64


def up(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, router_weights: Tensor,
       x: ScaledRows, act: ScaledRows) -> None:  # fmt: skip
    """act[p] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p, quantised by groups.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "blockscaled".
        routing: the sorted routes, blocks of `plan.block_m`.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        router_weights: [M, top_k], contiguous.
        x: the hidden states, e4m3 with a scale per group of 128 columns.
        act: [max_rows, I], e4m3, rows 16 bytes aligned; values and scales are written, those of padding rows or not.
    """
    _launch(
        x._replace(values=pingpong.copyable(x.values)), True, args.w1, args.w1_scale, args.w1_bias,
        router_weights if problem.router_weight_on_input else None, act, routing, progress, problem, plan, "up",
        K=problem.hidden_size, **activation_constexprs(problem),
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, act: ScaledRows,
         rows: Tensor) -> None:  # fmt: skip
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "blockscaled".
        routing: the sorted routes, blocks of `plan.block_m`.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        act: [max_rows, I], what `up` wrote.
        rows: [max_rows, H], rows 16 bytes aligned; written, padding rows or not.
    """
    _launch(
        act, False, args.w2, args.w2_scale, args.w2_bias, None, ScaledRows(rows), routing, progress, problem, plan,
        "down", K=problem.intermediate_size, ACTIVATION=None, GATED=False, INTERLEAVED=False, HAS_LIMIT=False,
    )  # fmt: skip


def _launch(rows: ScaledRows, gather: bool, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
            router_weights: Tensor | None, out: ScaledRows, routing: Routing, progress: Tensor, problem: Problem,
            plan: Plan, name: str, **constexprs) -> None:  # fmt: skip
    config = plan.up if name == "up" else plan.down
    values, columns = rows.values, out.values.shape[1]
    bias, stride_be = bias_and_stride(bias)
    Launcher(plan.kernels)(
        name, blockscaled_kernel,
        min(plan.num_sms, routing.tile_experts.numel() * cdiv(columns, config.block_n)),
        (values if gather else None, None if gather else pingpong.descriptor(values, [_ROWS, GROUP]),
         pingpong.weight_descriptor(weight, GROUP, GROUP), rows.scale, weight_scale, bias, router_weights,
         pingpong.result_descriptor(out.values, [_ROWS, pingpong.BOX if out.scale is None else GROUP]), out.scale,
         routing.sorted_routes, routing.tile_experts, routing.num_padded, progress, problem.num_routes,
         values.stride(0) if gather else 0, rows.stride_row, rows.stride_group, *weight_scale.stride(), stride_be,
         out.stride_row, out.stride_group, problem.alpha or 0.0, problem.limit or 0.0),
        lambda: {
            "N": columns, "TOP_K": problem.top_k, **constexprs, "DTYPE": pingpong.TRITON_DTYPES[problem.dtype],
            "PROXY_FENCE": pingpong.PROXY_FENCE, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "GROUP_M": config.group_m, "STAGES": config.num_stages, "num_warps": config.num_warps,
        },
    )  # fmt: skip
