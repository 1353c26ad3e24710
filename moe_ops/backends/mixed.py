"""Launches of the mixed-input kernel: 8- or 4-bit weights beside 16-bit rows, many rows an expert, on Hopper.

They take the place of the pipeline's own two GEMMs where `tuning.variants.mixed_obstacle` sees none. Hidden states are
copied to the sorted rows once a call, columns in planes within parts of 64; a row ends with zeros up to whole parts.
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
    next_power_of_2,
    stored_weight,
    weight_scales,
)
from moe_ops.dispatch import Plan
from moe_ops.kernels.mixed import mixed_kernel
from moe_ops.kernels.mixed_operand import COLUMNS, ROWS
from moe_ops.kernels.planes import scatter_planes_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import Routing

# Of a program that copies rows.
_SCATTER_ROWS, _SCATTER_COLUMNS = 4, 1024
# Rows of a box of a result, of which a tile with few rows has one.
_BOX_ROWS = 64


def empty(like: Tensor, columns: int, problem: Problem, plan: Plan) -> Tensor:
    """[max_rows, columns up to whole parts] in the compute dtype."""
    return like.new_empty((plan.max_rows, plan.part_width(columns)), dtype=problem.dtype)


def scatter(x: Tensor, rows: Tensor, problem: Problem, plan: Plan, routing: Routing) -> None:
    """Writes the hidden states to the rows of their routes, in planes; padding rows stay as they are.

    Args:
        x: the hidden states, [M, H], any strides.
        rows: from `empty`; written.
        problem: the call.
        plan: of variant "mixed".
        routing: the sorted routes, blocks of `plan.block_m`.
    """
    block = max(COLUMNS.value, min(_SCATTER_COLUMNS, next_power_of_2(rows.shape[1])))
    Launcher(plan.kernels)(
        "planes", scatter_planes_kernel, cdiv(problem.num_tokens, _SCATTER_ROWS) * cdiv(rows.shape[1], block),
        (x, rows, routing.inverse, problem.num_tokens, problem.hidden_size, *x.stride(), rows.stride(0)),
        lambda: {
            "TOP_K": problem.top_k, "PLANES": plan.planes, "PART": COLUMNS.value, "ROWS": _SCATTER_ROWS, "BLOCK": block,
            "num_warps": 4, **dependent(plan),
        },
    )  # fmt: skip


def up(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, router_weights: Tensor,
       x: Tensor, act: Tensor) -> None:  # fmt: skip
    """act[p] = act(x[p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "mixed".
        routing: the sorted routes, blocks of `plan.block_m`.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        router_weights: [M, top_k], contiguous.
        x: the sorted rows in planes, from `scatter`.
        act: from `empty`, in planes; written, padding rows or not.
    """
    sides, interleaved = (2 if problem.activation.gated else 1), problem.gate_up_layout == "interleaved"
    w1 = stored_weight(args.w1, problem, plan)
    stride_e, stride_n, stride_k = w1.stride()
    steps = (stride_n, 2 * stride_n) if interleaved and sides == 2 else (problem.intermediate_size * stride_n, stride_n)
    _launch(
        x, _weight_descriptor(w1, sides, (stride_e, *steps, stride_k), plan.up.block_k // plan.planes), args.w1_bias,
        weight_scales(args, problem, "w1"), router_weights if problem.router_weight_on_input else None, act,
        problem.intermediate_size, routing, progress, problem, plan, "up", K=problem.hidden_size,
        **activation_constexprs(problem),
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, act: Tensor,
         rows: Tensor) -> None:  # fmt: skip
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "mixed".
        routing: the sorted routes, blocks of `plan.block_m`.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        act: what `up` wrote.
        rows: [max_rows, H], rows 16 bytes aligned; written, padding rows or not.
    """
    w2 = stored_weight(args.w2, problem, plan)
    stride_e, stride_n, stride_k = w2.stride()
    _launch(
        act, _weight_descriptor(w2, 1, (stride_e, stride_n, stride_n, stride_k), plan.down.block_k // plan.planes),
        args.w2_bias, weight_scales(args, problem, "w2"), None, rows, problem.hidden_size, routing, progress, problem,
        plan, "down", K=problem.intermediate_size, ACTIVATION=None, GATED=False, INTERLEAVED=False, HAS_LIMIT=False,
    )  # fmt: skip


def _weight_descriptor(weight: Tensor, sides: int, strides: tuple[int, ...], columns: int) -> TensorDescriptor:
    """[E, sides, N, K / planes] in boxes of all sides; past an expert's last row there are zeros, not the next one's.

    The up GEMM's sides are gate and up, wherever the rows of each lie.
    """
    experts, rows, stored = weight.shape
    box = [1, sides, ROWS.value // sides, columns]
    return pingpong.descriptor(weight, box, (experts, sides, rows // sides, stored), strides)


def _launch(rows: Tensor, weights_desc: TensorDescriptor, bias: Tensor | None, scales: tuple,
            router_weights: Tensor | None, out: Tensor, columns: int, routing: Routing, progress: Tensor,
            problem: Problem, plan: Plan, name: str, **constexprs) -> None:  # fmt: skip
    config = plan.up if name == "up" else plan.down
    bias, stride_be = bias_and_stride(bias)
    Launcher(plan.kernels)(
        name, mixed_kernel,
        min(plan.num_sms, routing.tile_experts.numel() * cdiv(columns, config.block_n)),
        (pingpong.descriptor(rows, [config.block_m, COLUMNS.value]), weights_desc, *scales, bias, router_weights,
         pingpong.result_descriptor(out, [_BOX_ROWS, COLUMNS.value]), routing.sorted_routes, routing.tile_experts,
         routing.num_padded, progress, problem.num_routes, stride_be, problem.alpha or 0.0, problem.limit or 0.0),
        lambda: {
            "N": columns, **constexprs, "FORMAT": problem.scheme.name, "SCALE_COLUMNS": problem.scheme.scale_columns,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m, "STAGES": config.num_stages, "num_warps": config.num_warps,
        },
    )  # fmt: skip
