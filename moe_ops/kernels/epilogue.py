"""What the kernels in Gluon do with a tile in registers: halves of it, scales and biases by column, stores by TMA."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import block_barrier, tma_store

_LARGEST_FLOAT = gl.constexpr(3.4028234663852886e38)
_SMALLEST_NORMAL = gl.constexpr(1.1754943508222875e-38)
_NAN_STAYS = gl.constexpr(tl.PropagateNan.ALL)
# Rows of block-scaled weights come in multiples of it. What depends on a unit alone is the same for all threads:
# columns by themselves would be kept in registers, one for each unit, while the accumulators need them.
_UNIT = gl.constexpr(16)


@gluon.jit
def store_box(y, out_smem, out_desc, row, used, column, PENDING: gl.constexpr = 0):
    """Stores the first `used` rows of the result, or all, from registers by TMA, box by box of the descriptor.

    The rest is padding, which nobody reads. The descriptor has the result as [first row, row, column], whose strides
    over the first two are the same: the box that begins `skipped` rows early and at row `skipped` begins in the same
    place, and TMA clips its last `skipped` rows. A box before which there are not so many rows is stored whole.

    The buffer is free once all stores before but the last PENDING have read theirs.
    """
    ROWS: gl.constexpr = out_desc.block_shape[1]
    tma.store_wait(PENDING)
    block_barrier()
    out_smem.reshape((out_smem.shape[0] * ROWS, y.shape[1])).slice(0, y.shape[0]).store(y.to(out_desc.dtype))
    fence_async_shared()
    block_barrier()
    for i in gl.static_range(y.shape[0] // ROWS):
        first = row + i * ROWS
        skipped = 0
        if used is not None:
            skipped = gl.minimum(gl.maximum(gl.minimum((i + 1) * ROWS - used, ROWS), 0), first)
        tma_store(out_desc, [first - skipped, skipped, column], out_smem.slice(i, 1))


@gluon.jit
def halves(x):
    """[M, N] -> its left and right halves; in registers, since a thread of wgmma has columns of both."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=_NAN_STAYS)


@gluon.jit
def rounded(y, DTYPE: gl.constexpr):
    """fp32 to DTYPE, two at a time: one by one takes an instruction of a slow unit for each."""
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [y], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [y], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def quantize(y, scale):
    """y / scale in fp32, for a conversion to fp8, which saturates; by a reciprocal, as in `kernels.quantize`."""
    return y.to(gl.float32) * gl.div_rn(1.0, scale)


@gluon.jit
def store_group(left, right, out_smem, out_desc, act_scales, row, used, group, N: gl.constexpr):
    """Stores a group of columns, of which these are the halves, in fp8, with a scale a row from their maximum.

    The scales are those of `kernels.quantize.row_scales`, in Gluon.
    """
    act_scale_ptr, stride_am, stride_ag = act_scales
    y = gl.join(left, right).permute((0, 2, 1)).reshape((left.shape[0], 2 * left.shape[1])).to(gl.float32)
    largest = gl.reduce(gl.abs(y), 1, _larger)
    scale = gl.maximum(gl.div_rn(gl.minimum(largest, _LARGEST_FLOAT), 448.0), _SMALLEST_NORMAL)
    scale = gl.where(largest != largest, largest, scale)
    rows = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, y.type.layout))
    gl.store(act_scale_ptr + rows.to(gl.int64) * stride_am + group.to(gl.int64) * stride_ag, scale,
             mask=(rows >= 0) & (group < triton.cdiv(N, y.shape[1])))  # fmt: skip
    store_box(quantize(y, scale[:, None]), out_smem, out_desc, row, used, group * y.shape[1])


@gluon.jit
def _biased(x, bias_ptr, column, N: gl.constexpr):
    """x + bias[column...] in fp32; columns from N on, a multiple of `_UNIT` as `column` is, do not exist."""
    if bias_ptr is not None:
        columns = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
        exist = column + columns // _UNIT * _UNIT < N
        x += gl.load(bias_ptr + column + columns, mask=exist, other=0.0).to(gl.float32)[None, :]
    return x


@gluon.jit
def store_groups(acc0, acc1, out_smem, out_desc, epilogue, expert, row, used, block_n, first, second,
                 N: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ACTIVATION: gl.constexpr,
                 HAS_LIMIT: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """A tile of the block-scaled kernel: routing weight, bias and activation; its columns, quantised in the up GEMM."""
    (sorted_routes_ptr, tile_experts_ptr, num_routes, bias_ptr, stride_be, router_weights_ptr, act_scale_ptr, stride_am,
     stride_ag, alpha, limit) = epilogue  # fmt: skip
    act_scales = (act_scale_ptr, stride_am, stride_ag)
    GROUP: gl.constexpr = acc0.shape[1]
    WEIGHT_ROWS: gl.constexpr = 2 * N if GATED else N
    if router_weights_ptr is not None:
        rows = row + gl.arange(0, acc0.shape[0], gl.SliceLayout(1, acc0.type.layout))
        routes = gl.load(sorted_routes_ptr + rows)
        weights = gl.load(router_weights_ptr + routes, mask=routes < num_routes, other=0.0).to(gl.float32)
        acc0 *= weights[:, None]
        acc1 *= weights[:, None]
    if bias_ptr is not None:
        bias_ptr += expert.to(gl.int64) * stride_be
    if not GATED:
        for half in gl.static_range(2):
            left, right = halves(_biased(acc1 if half else acc0, bias_ptr, second if half else first, WEIGHT_ROWS))
            if ACTIVATION is None:
                store_box(left, out_smem, out_desc, row, used, (2 * block_n + half) * GROUP)
                store_box(right, out_smem, out_desc, row, used, (2 * block_n + half) * GROUP + GROUP // 2)
            else:
                left = rounded(nonlinearity(left, ACTIVATION, alpha, PTX=True), DTYPE)
                right = rounded(nonlinearity(right, ACTIVATION, alpha, PTX=True), DTYPE)
                store_group(left, right, out_smem, out_desc, act_scales, row, used, 2 * block_n + half, N)
    else:
        MIDDLE: gl.constexpr = GROUP // 2
        for side in gl.static_range(2):
            if INTERLEAVED:
                pairs = _biased(acc1 if side else acc0, bias_ptr, second if side else first, WEIGHT_ROWS)
                gate, up = pairs.reshape((acc0.shape[0], MIDDLE, 2)).split()
            else:
                gate = _biased(halves(acc0)[side], bias_ptr, first + side * MIDDLE, WEIGHT_ROWS)
                up = _biased(halves(acc1)[side], bias_ptr, second + side * MIDDLE, WEIGHT_ROWS)
            y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit, PTX=True)
            if N % GROUP != 0:
                # Gate rows past the last one are rows of the up half, which are not for the maximum.
                within = gl.arange(0, MIDDLE, gl.SliceLayout(0, y.type.layout)) // _UNIT * _UNIT
                y = gl.where((block_n * GROUP + side * MIDDLE + within < N)[None, :], y, 0.0)
            # Rounded at once, the first side takes half the registers beside the second.
            y = rounded(y, DTYPE)
            if side == 0:
                left = y
        store_group(left, y, out_smem, out_desc, act_scales, row, used, block_n, N)
