"""Launches of the ping-pong kernel: descriptors, constexprs and grid of the up and the down GEMM on Hopper.

They take the place of the pipeline's own two GEMMs where `tuning.variants.pingpong_obstacle` sees none, with the same
operands; the row block is 64.
"""

import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_ops.backends.launch import Launcher, bias_and_stride
from moe_ops.dispatch import Plan
from moe_ops.kernels.pingpong import pingpong_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.routing import Routing

# Columns of a box of the result; two such boxes, one a consumer, beside the stages.
_BOX = 64
# Alignment of what cp.async copies: 16 bytes, 8 elements.
_COPY_BYTES, _COPY_ELEMENTS = 16, 8
# Whether the consumers fence the gathered rows; measured, see docs/kernels.md.
PROXY_FENCE = True


def up(args: Arguments, problem: Problem, plan: Plan, routing: Routing, router_weights: Tensor, act: Tensor) -> None:
    """act[p] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "pingpong".
        routing: the sorted routes, blocks of 64.
        router_weights: [M, top_k], contiguous.
        act: [max_rows, I], rows 16 bytes aligned; written, padding rows included.
    """
    activation = problem.activation
    _launch(
        _copyable(args.hidden_states), None, args.w1, args.w1_bias,
        router_weights if problem.router_weight_on_input else None, act, routing, problem, plan, "up",
        K=problem.hidden_size, ACTIVATION=activation.name, GATED=activation.gated,
        INTERLEAVED=activation.gated and problem.gate_up_layout == "interleaved",
        HAS_LIMIT=problem.limit is not None,
    )  # fmt: skip


def down(args: Arguments, problem: Problem, plan: Plan, routing: Routing, act: Tensor, rows: Tensor) -> None:
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p.

    Args:
        args: the call.
        problem: its description.
        plan: of variant "pingpong".
        routing: the sorted routes, blocks of 64.
        act: [max_rows, I], what `up` wrote.
        rows: [max_rows, H], rows 16 bytes aligned; written, padding rows included.
    """
    _launch(
        None, act, args.w2, args.w2_bias, None, rows, routing, problem, plan, "down",
        K=problem.intermediate_size, ACTIVATION=None, GATED=False, INTERLEAVED=False, HAS_LIMIT=False,
    )  # fmt: skip


def _launch(x: Tensor | None, act: Tensor | None, weight: Tensor, bias: Tensor | None, router_weights: Tensor | None,
            out: Tensor, routing: Routing, problem: Problem, plan: Plan, name: str, *, GATED: bool, INTERLEAVED: bool,
            **constexprs) -> None:  # fmt: skip
    config = plan.up if name == "up" else plan.down
    columns = config.block_n * 2 if GATED else config.block_n
    box = columns // 2 if GATED and not INTERLEAVED else columns
    bias, stride_be = bias_and_stride(bias)
    Launcher(plan.kernels)(
        name, pingpong_kernel,
        min(plan.num_sms, routing.tile_experts.numel() * triton.cdiv(out.shape[1], config.block_n)),
        (x, None if act is None else _descriptor(act, [config.block_m, config.block_k]),
         _weight_descriptor(weight, box, config.block_k), bias, router_weights,
         _descriptor(out, [config.block_m, _BOX]),
         routing.sorted_routes, routing.tile_experts, routing.num_padded, problem.num_routes,
         0 if x is None else x.stride(0), stride_be,
         problem.alpha or 0.0, problem.limit or 0.0),
        lambda: {
            "N": out.shape[1], "TOP_K": problem.top_k, "GATED": GATED, "INTERLEAVED": INTERLEAVED, **constexprs,
            "N_MAJOR": weight.stride(2) != 1, "PROXY_FENCE": PROXY_FENCE, "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
            "STAGES": config.num_stages, "num_warps": config.num_warps,
        },
    )  # fmt: skip


def _copyable(x: Tensor) -> Tensor:
    """x itself if 16 bytes at a time can be copied from its rows, a copy otherwise."""
    if x.stride(1) == 1 and x.stride(0) % _COPY_ELEMENTS == 0 and x.data_ptr() % _COPY_BYTES == 0:
        return x
    return x.new_empty(x.shape).copy_(x)


def _descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, _swizzled(tensor, 2))


def _weight_descriptor(weight: Tensor, columns: int, block_k: int) -> TensorDescriptor:
    """Box [1, columns, block_k] of a K-major weight [E, N, K], [1, block_k, columns] of an N-major one as [E, K, N].

    Past an expert's last row and column there are zeros, never the next expert.
    """
    box = [1, columns, block_k]
    if weight.stride(2) != 1:
        weight, box = weight.transpose(1, 2), [1, block_k, columns]
    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), box, _swizzled(weight, 3))


def _swizzled(tensor: Tensor, rank: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * tensor.element_size(), rank=rank)
