"""What the kernels in Gluon do with a tile in registers: halves of it, scales and biases by column, stores by TMA."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from moe_ops.kernels.compat import block_barrier, tma_store

_LARGEST_FLOAT = gl.constexpr(3.4028234663852886e38)
_SMALLEST_NORMAL = gl.constexpr(1.1754943508222875e-38)


@gluon.jit
def store_box(y, out_smem, out_desc, row, column):
    """Stores a box of the result from registers, by TMA."""
    # The buffer is free once the store before this one has read it.
    tma.store_wait(0)
    block_barrier()
    out_smem.store(y.to(out_desc.dtype))
    fence_async_shared()
    block_barrier()
    tma_store(out_desc, [row, column], out_smem)


@gluon.jit
def halves(x):
    """[M, N] -> its left and right halves; in registers, since a thread of wgmma has columns of both."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def affine(x, channels, column, N: gl.constexpr):
    """x * scale[column...] + bias[column...] in fp32; columns from N on do not exist."""
    scale_ptr, bias_ptr = channels
    columns = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    if scale_ptr is not None:
        x *= gl.load(scale_ptr + columns, mask=columns < N).to(gl.float32)[None, :]
    if bias_ptr is not None:
        x += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    return x


@gluon.jit
def quantize(y, scale):
    """clamp(y / scale, -448, 448) in fp32; as in torch.clamp a NaN stays a NaN.

    The division is rounded to nearest by a step from an approximation, far shorter than the instruction for it.
    """
    reciprocal = gl.div_rn(1.0, scale)
    q = y * reciprocal
    near = gl.fma(gl.fma(-q, scale, y), reciprocal, q)
    return gl.where(q > 448.0, 448.0, gl.where(q < -448.0, -448.0, near))


@gluon.jit
def store_group(left, right, out_smem, out_desc, act_scales, row, group, N: gl.constexpr):
    """Stores a group of 128 columns in fp8, with a scale a row from their maximum."""
    act_scale_ptr, stride_am, stride_ag = act_scales
    left, right = left.to(gl.float32), right.to(gl.float32)
    # The bits of a larger absolute value are a larger integer, and those of a NaN the largest.
    bits = gl.maximum(gl.max(gl.abs(left).to(gl.int32, bitcast=True), 1),
                      gl.max(gl.abs(right).to(gl.int32, bitcast=True), 1))  # fmt: skip
    largest = bits.to(gl.float32, bitcast=True)
    scale = gl.maximum(gl.div_rn(gl.minimum(largest, _LARGEST_FLOAT), 448.0), _SMALLEST_NORMAL)
    scale = gl.where(largest != largest, largest, scale)
    rows = row + gl.arange(0, left.shape[0], gl.SliceLayout(1, left.type.layout))
    gl.store(act_scale_ptr + rows.to(gl.int64) * stride_am + group.to(gl.int64) * stride_ag, scale,
             mask=(rows >= 0) & (group < triton.cdiv(N, 2 * left.shape[1])))  # fmt: skip
    store_box(quantize(left, scale[:, None]), out_smem, out_desc, row, group * 2 * left.shape[1])
    store_box(quantize(right, scale[:, None]), out_smem, out_desc, row, group * 2 * left.shape[1] + left.shape[1])
