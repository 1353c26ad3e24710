"""Quantisation of rows to fp8 or int8. The definition is that of `moe_ops.quantization.quantize_activations`."""

import triton
import triton.language as tl

from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait

# Bounds of float32: the largest number, and the smallest that is not subnormal.
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_FLOAT_TINY = tl.constexpr(1.1754943508222875e-38)
# Added and taken away again, it rounds numbers below 2^22 to integers, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def row_scales(y, LARGEST: tl.constexpr):
    """Scales of the rows of y: max |y| / LARGEST within float32's normal numbers; NaN where y has one. [rows]"""
    largest = tl.minimum(tl.max(tl.abs(y), 1), _FLOAT_MAX)
    scale = tl.maximum(tl.div_rn(largest, LARGEST), _FLOAT_TINY)
    # tl.max passes over NaN.
    return tl.where(tl.max((y != y).to(tl.int32), 1) > 0, float("nan"), scale)


@triton.jit
def given_scale(scale):
    """A given scale, of a normal number at least: one of 0 has a reciprocal then, and leaves zeros zeros."""
    return tl.where(tl.abs(scale) < _FLOAT_TINY, _FLOAT_TINY, scale)


@triton.jit
def quantize(y, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """y / scale, both in fp32, rounded to `dtype`; a NaN stays one where `dtype` has it, and is 0 in int8.

    By a reciprocal: a quotient that is not the nearest float32 rounds to the same number of 8 bits, but for ties.
    """
    q = y * tl.div_rn(1.0, scale)
    if dtype == tl.int8:
        q = tl.where(q > LARGEST, LARGEST, tl.where(q < -LARGEST, -LARGEST, q))
        q = tl.where(q == q, (q + _ROUND) - _ROUND, 0.0)
    # The conversion to fp8 saturates.
    return q.to(dtype)


@triton.jit(do_not_specialize=["num_rows", "num_routes"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, given_ptr, sorted_routes_ptr, tile_experts_ptr, num_rows, num_routes, K,
    stride_xm, stride_xk, stride_qm, stride_sm, stride_sg, stride_ge,
    LARGEST: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q[r] = round(x[r] / scale) by units of WIDTH columns, UNITS of them a program.

    A unit has a scale of its own, which is stored, or is divided by a given one (per expert, stride_ge). Sorted rows:
    those without a route are left out, and come from the launch before this one. Other rows do not: this launch runs
    beside the one before it, and ends after it, so that whoever waits for this one has both.
    """
    if PDL:
        if tile_experts_ptr is not None:
            gdc_wait()
        gdc_launch_dependents()
    num_groups = tl.cdiv(K, WIDTH)
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row, group = (unit // num_groups).to(tl.int64), (unit % num_groups).to(tl.int64)
    kept = row < num_rows
    if tile_experts_ptr is not None:
        # Routes past the last row block are nobody's: whether there is a block has to be known first.
        expert = tl.load(tile_experts_ptr + row // BLOCK_M, mask=kept, other=-1)
        kept = expert >= 0
        kept = tl.load(sorted_routes_ptr + row, mask=kept, other=num_routes) < num_routes
    columns = (group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]).to(tl.int64)
    mask = kept[:, None] & (columns < K)
    y = tl.load(x_ptr + row[:, None] * stride_xm + columns * stride_xk, mask=mask, other=0.0).to(tl.float32)
    if given_ptr is None:
        scale = row_scales(y, LARGEST)
        tl.store(scale_ptr + row * stride_sm + group * stride_sg, scale, mask=kept)
    elif tile_experts_ptr is not None:
        scale = given_scale(tl.load(given_ptr + expert.to(tl.int64) * stride_ge, mask=kept, other=1.0))
    else:
        scale = given_scale(tl.load(given_ptr + row * 0))
    q = quantize(y, scale[:, None], q_ptr.dtype.element_ty, LARGEST)
    tl.store(q_ptr + row[:, None] * stride_qm + columns, q, mask=mask)
    if PDL:
        if tile_experts_ptr is None:
            gdc_wait()
