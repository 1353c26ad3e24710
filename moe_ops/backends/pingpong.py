"""Launches of the ping-pong kernel: descriptors, constexprs and grid of the up and the down GEMM on Hopper.

They take the place of the pipeline's own two GEMMs where `tuning.variants.pingpong_obstacle` sees none, with the same
operands; the row block is 64.
"""

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_ops.backends.launch import Launcher, activation_constexprs, bias_and_stride, cdiv
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import Plan
from moe_ops.kernels.pingpong import pingpong_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import Routing

# Columns of a box of the result; beside the stages each consumer has one such box, or two.
BOX = 64
# What a thread's cp.async copies, and the alignment of it.
_COPY_BYTES = 16
# A row of a box in shared memory takes as many bytes as the swizzle spans, at most.
_LARGEST_SWIZZLE = 128
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Whether the consumers fence the gathered rows; measured, see docs/kernels.md.
PROXY_FENCE = True


def up(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, router_weights: Tensor,
       x: ScaledRows, act: Tensor, act_scale: Tensor | None) -> None:  # fmt: skip
    """act[p] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "pingpong".
        routing: the sorted routes, blocks of 64.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        router_weights: [M, top_k], contiguous.
        x: the hidden states, quantised where w1 is.
        act: [max_rows, I], rows 16 bytes aligned; written but for padding rows. In the compute dtype, or in fp8.
        act_scale: scales that an fp8 act is divided by, float32: [1], or [E], one per expert. None without.
    """
    _launch(
        x._replace(values=copyable(x.values)), True, args.w1, args.w1_scale, args.w1_bias,
        router_weights if problem.router_weight_on_input else None, act, act_scale, routing, progress, problem, plan,
        "up", K=problem.hidden_size, **activation_constexprs(problem),
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, routing: Routing, progress: Tensor, act: ScaledRows,
         rows: Tensor) -> None:  # fmt: skip
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "pingpong".
        routing: the sorted routes, blocks of 64.
        progress: int32, zero: counts the tiles that have been loaded; see `kernels.persistent.keep_step`.
        act: [max_rows, I], rows 16 bytes aligned, quantised where w2 is.
        rows: [max_rows, H], rows 16 bytes aligned; written but for padding rows.
    """
    _launch(
        act, False, args.w2, args.w2_scale, args.w2_bias, None, rows, None, routing, progress, problem, plan, "down",
        K=problem.intermediate_size, ACTIVATION=None, GATED=False, INTERLEAVED=False, HAS_LIMIT=False,
    )  # fmt: skip


def _launch(rows: ScaledRows, gather: bool, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None,
            router_weights: Tensor | None, out: Tensor, out_scale: Tensor | None, routing: Routing, progress: Tensor,
            problem: Problem, plan: Plan, name: str, *, GATED: bool, INTERLEAVED: bool, **constexprs
            ) -> None:  # fmt: skip
    config = plan.up if name == "up" else plan.down
    columns = config.block_n * 2 if GATED else config.block_n
    box = columns // 2 if GATED and not INTERLEAVED else columns
    values = rows.values
    per_channel = weight_scale is not None and weight_scale.ndim == 2
    if per_channel:
        weight_scale, stride_we = bias_and_stride(weight_scale)
    else:
        stride_we = 0 if weight_scale is None else weight_scale.stride(0)
    bias, stride_be = bias_and_stride(bias)
    Launcher(plan.kernels)(
        (name, out.dtype), pingpong_kernel,
        min(plan.num_sms, routing.tile_experts.numel() * cdiv(out.shape[1], config.block_n)),
        (values if gather else None, None if gather else descriptor(values, [config.block_m, config.block_k]),
         weight_descriptor(weight, box, config.block_k), rows.scale, None if per_channel else weight_scale,
         weight_scale if per_channel else None, out_scale, bias, router_weights,
         result_descriptor(out, [config.block_m, BOX]),
         routing.sorted_routes, routing.tile_experts, routing.num_padded, progress,
         problem.num_routes,
         values.stride(0) if gather else 0, rows.stride_row, rows.stride_expert,
         stride_we,
         0 if out_scale is None or out_scale.numel() == 1 else out_scale.stride(0), stride_be,
         problem.alpha or 0.0, problem.limit or 0.0),
        lambda: {
            "N": out.shape[1], "TOP_K": problem.top_k, "GATED": GATED, "INTERLEAVED": INTERLEAVED, **constexprs,
            "N_MAJOR": weight.stride(2) != 1, "DTYPE": TRITON_DTYPES[problem.dtype], "PROXY_FENCE": PROXY_FENCE,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m, "STAGES": config.num_stages, "num_warps": config.num_warps,
        },
    )  # fmt: skip


def copyable(x: Tensor) -> Tensor:
    """x itself if 16 bytes at a time can be copied from its rows, a copy otherwise."""
    row_bytes = x.stride(0) * x.element_size()
    if x.stride(1) == 1 and row_bytes % _COPY_BYTES == 0 and x.data_ptr() % _COPY_BYTES == 0:
        return x
    return x.new_empty(x.shape).copy_(x)


def descriptor(
    tensor: Tensor, box: list[int], shape: Sequence[int] | None = None, strides: Sequence[int] | None = None
) -> TensorDescriptor:
    """A descriptor of a tensor, or of its memory as one of other sizes; a row of the box takes at most 128 bytes."""
    layout = _swizzled(tensor.element_size(), box[-1], len(box))
    return TensorDescriptor(tensor, list(shape or tensor.shape), list(strides or tensor.stride()), box, layout)


def result_descriptor(out: Tensor, box: list[int]) -> TensorDescriptor:
    """[first row, row, column] of a result whose rows are a multiple of the box's, for `kernels.epilogue.store_box`.

    The box of some rows that begins at (r - s, s) begins at row r, and its last s rows are outside.
    """
    (rows, columns), (stride, _) = out.shape, out.stride()
    return descriptor(out, [1, *box], (rows - box[0] + 1, box[0], columns), (stride, stride, 1))


def weight_descriptor(weight: Tensor, columns: int, block_k: int) -> TensorDescriptor:
    """Box [1, columns, block_k] of a K-major weight [E, N, K], [1, block_k, columns] of an N-major one as [E, K, N].

    Past an expert's last row and column there are zeros, never the next expert.
    """
    box = [1, columns, block_k]
    if weight.stride(2) != 1:
        weight, box = weight.transpose(1, 2), [1, block_k, columns]
    return descriptor(weight, box)


@functools.cache  # Gluon checks a layout in more time than a launch should take.
def _swizzled(itemsize: int, columns: int, rank: int) -> NVMMASharedLayout:
    swizzle = min(_LARGEST_SWIZZLE, columns * itemsize)
    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * itemsize, rank=rank)
