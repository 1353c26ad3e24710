"""A block of packed 4-bit weights in registers, as wgmma's left operand, and what is stored for its groups of columns.

For `kernels.packed`, whose head has the form of a tile; `kernels.mixed_operand` calls what does not depend on it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_ops.kernels.dequantize import scale_values
from moe_ops.kernels.packed_ring import BLOCK, BLOCK_K, PLANES
from moe_ops.kernels.pairs import (
    adds,
    e2m1_factor,
    load_code,
    pair_code,
    pair_offset,
    pair_product,
    scaled_e2m1,
    scaled_operands,
    scales_at_once,
)

# Rows of weights of a tile.
ROWS = gl.constexpr(64)
# Of one block of them in the order of wgmma's rows, [ROWS, units, elements].
BLOCK_LAYOUT = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [8, 0, 0], [0, 0, 2], [0, 0, 4]],
    [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [64, 4, 8],
))  # fmt: skip


@gluon.jit
def plane_numbers(q, offset, plane: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr):
    """A plane of stored weights, as numbers of DTYPE; offset: what is added to them where they have an offset."""
    ADDS: gl.constexpr = adds(FORMAT, DTYPE, False)
    if ADDS:
        return gl.inline_asm_elementwise(
            pair_code(FORMAT, DTYPE, plane, True), "=r,r,r", [q, offset], dtype=offset.dtype, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            pair_code(FORMAT, DTYPE, plane, False), "=r,r", [q], dtype=offset.dtype, is_pure=True, pack=2
        )


@gluon.jit
def times(values, scale, DTYPE: gl.constexpr):
    """values * scale, rounded once to DTYPE."""
    if scale.dtype == DTYPE:
        return gl.inline_asm_elementwise(
            pair_product(DTYPE), "=r,r,r", [values, scale], dtype=values.dtype, is_pure=True, pack=2
        )
    else:
        return (values.to(gl.float32) * scale).to(DTYPE)


@gluon.jit
def two_planes(q, plane: gl.constexpr, offset, scale, FORMAT: gl.constexpr, UNITS: gl.constexpr, DTYPE: gl.constexpr):
    """A plane of stored weights and the next one as wgmma multiplies them. [ROWS, 4, 8, 2]"""
    if scales_at_once(FORMAT, DTYPE):
        first, second = gl.inline_asm_elementwise(
            scaled_e2m1(plane), scaled_operands(), [q, scale], dtype=(offset.dtype, offset.dtype), is_pure=True, pack=16
        )
    else:
        first = plane_numbers(q, offset, plane, FORMAT, DTYPE)
        second = plane_numbers(q, offset, plane + 1, FORMAT, DTYPE)
        if UNITS:
            first, second = times(first, scale, DTYPE), times(second, scale, DTYPE)
    return gl.join(first, second)


@gluon.jit
def operand(planes, LAYOUT: gl.constexpr):
    """Two planes of a block [ROWS, 4, 8, 2], as wgmma's left operand in `layout.unit_order`; it moves nothing."""
    values = planes.reshape((ROWS, 4, 4, 2, 2)).permute((0, 4, 2, 1, 3)).reshape((ROWS, 2 * BLOCK))
    return gl.convert_layout(values, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def stored(ptrs, stride_k, mask, step, block: gl.constexpr, K: gl.constexpr, SCALE_COLUMNS: gl.constexpr,
           UNITS: gl.constexpr):  # fmt: skip
    """What groups of columns have (scales, zero points), for a block of a step, as stored; past K there is 0.

    [ROWS] where a group is a block (UNITS False), else [ROWS, 4], one for each unit.
    """
    COLUMNS: gl.constexpr = BLOCK * PLANES
    k = step * BLOCK_K + block * COLUMNS
    if UNITS:
        return group_words(ptrs, stride_k, mask, k, COLUMNS // 4, K, SCALE_COLUMNS, BLOCK_LAYOUT)
    else:
        return _word(ptrs + (k // SCALE_COLUMNS).to(gl.int64) * stride_k, mask & (k < K))


@gluon.jit
def group_words(ptrs, stride_k, mask, column, WIDTH: gl.constexpr, K: gl.constexpr, SCALE_COLUMNS: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """What groups of columns have, every WIDTH columns from one on, as stored; past K there is 0.

    ptrs, mask: of the rows. LAYOUT: of [rows, groups, weights of a group], of which [rows, groups] come.
    """
    groups = gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    k = column + groups * WIDTH
    group_ptrs = ptrs[:, None] + (k // SCALE_COLUMNS).to(gl.int64)[None, :] * stride_k
    return _word(group_ptrs, mask[:, None] & (k < K)[None, :])


@gluon.jit
def _word(ptrs, mask):
    """What is stored there, or 0; of fewer than 32 bits in an int32: two in a register would have to be waited for."""
    BITS: gl.constexpr = ptrs.dtype.element_ty.primitive_bitwidth
    if BITS == 32:
        return gl.load(ptrs, mask=mask, other=0)
    else:
        return gl.inline_asm_elementwise(
            load_code(BITS), "=&r,l,r", [ptrs, mask.to(gl.int32)], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def scales(word, FORMAT: gl.constexpr, DTYPE: gl.constexpr, STORED: gl.constexpr):
    """Scales from `stored`, of dtype STORED in memory, as what they belong to is multiplied with them."""
    if FORMAT == "mxfp4_w4a16":
        return e2m1_factor(word) if scales_at_once(FORMAT, DTYPE) else scale_values(word, FORMAT)
    else:
        return as_stored(word, STORED)


@gluon.jit
def as_stored(word, STORED: gl.constexpr):
    """The numbers of dtype STORED whose bits are in words."""
    if STORED.primitive_bitwidth == 32:
        return word
    else:
        return word.to(gl.int16).to(STORED, bitcast=True)


@gluon.jit
def offsets(words, odd, HAS_ZERO: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What `plane_numbers` adds: the zero point and what the numbers have too much, negative. In LAYOUT, of its shape

    words: zero points from `group_words`, two rows in a byte, if there are any; odd: which rows are the second.
    """
    SHAPE: gl.constexpr = (LAYOUT.shape[0], LAYOUT.shape[1], LAYOUT.shape[2])
    if HAS_ZERO:
        zero = ((words >> (4 * odd)[:, None]) & 15).to(gl.float32)
        return (-(zero + pair_offset(FORMAT, DTYPE))).to(DTYPE)[:, :, None].broadcast_to(SHAPE)
    else:
        MIDDLE: gl.constexpr = 8.0 if FORMAT == "int4_w4a16" else 0.0
        return gl.full(SHAPE, -(pair_offset(FORMAT, DTYPE) + MIDDLE), DTYPE, LAYOUT)
