"""Weights of 8 and 4 bits in registers, as wgmma's left operand beside 16-bit rows, with the scales of their groups.

For `kernels.mixed`, whose head has the form of a tile. A part is COLUMNS columns of K. An element of 16 bits has PLANES
codes, of columns side by side; code i of all elements of a part is plane i, and rows have their columns in that order
(`planes.scatter_planes_kernel`).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_ops.kernels.dequantize import scales_of, zero_rows
from moe_ops.kernels.packed_operand import as_stored, group_words, plane_numbers, times
from moe_ops.kernels.pairs import pair_sum_of_products

# Rows of weights of a tile.
ROWS = gl.constexpr(128)
# Columns of a part: 128 bytes of a row.
COLUMNS = gl.constexpr(64)


@triton.constexpr_function
def planes_of(FORMAT: str) -> int:
    """Weights in 16 bits."""
    return 2 if FORMAT == "int8_w8a16" else 4


@triton.constexpr_function
def groups_of(SCALE_COLUMNS: int) -> int:
    """Groups of columns with a scale in a part; 0: scales belong to rows."""
    return max(1, COLUMNS.value // SCALE_COLUMNS) if SCALE_COLUMNS else 0


@triton.constexpr_function
def operand_layout(USED: int):
    """Of a part's plane."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, USED, 16]), 2)


@triton.constexpr_function
def group_layout(WIDTH: int, GROUPS: int):
    """[ROWS, GROUPS, WIDTH / GROUPS], in the order in which wgmma's left operand has [ROWS, WIDTH]."""
    size = WIDTH // max(1, GROUPS)

    def at(k: int) -> list[int]:
        return [0, 0, k] if k < size else [0, k // size, 0]

    registers = [at(1), [8, 0, 0], at(8), *([at(16)] if WIDTH == 32 else []), [64, 0, 0]]
    lanes = [at(2), at(4), [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [128, WIDTH // size, size])


@gluon.jit
def codes(weights_smem, place, part: gl.constexpr, WIDTH: gl.constexpr, OPERAND: gl.constexpr):
    """A part of a stage's weights, as they are stored. [ROWS, WIDTH]"""
    stored = weights_smem.index(place).reshape((ROWS, weights_smem.shape[4]))
    return stored.slice(part * WIDTH, WIDTH, dim=1).load(OPERAND)


@gluon.jit
def weight_rows(block_n, N: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, LAYOUT: gl.constexpr):
    """Which rows of an expert's weight a tile's are, and which of them exist. [ROWS]"""
    row = gl.arange(0, ROWS, LAYOUT)
    if GATED:
        column = block_n * (ROWS // 2) + row % (ROWS // 2)
        half = row // (ROWS // 2)
        return (2 * column + half if INTERLEAVED else half * N + column), column < N
    else:
        column = block_n * ROWS + row
        return column, column < N


@gluon.jit
def group_side(side, expert, block_n, N: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
               FORMAT: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Where the scales and zero points of a tile's rows begin: (pointers of each, odd rows, rows that exist)."""
    scale_ptr, stride_se, stride_sn, _, zero_ptr, stride_ze, stride_zn, _ = side
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    rows, exist = weight_rows(block_n, N, GATED, INTERLEAVED, ROW_LAYOUT)
    scale_ptrs = scale_ptr + expert.to(gl.int64) * stride_se + rows.to(gl.int64) * stride_sn
    if zero_ptr is None:
        return scale_ptrs, scale_ptrs, rows % 2, exist
    else:
        zero_ptrs = zero_ptr + expert.to(gl.int64) * stride_ze + zero_rows(rows, FORMAT).to(gl.int64) * stride_zn
        return scale_ptrs, zero_ptrs, rows % 2, exist


@gluon.jit
def part_words(ptrs, stride_k, exist, column, K: gl.constexpr, SCALE_COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """What the groups of a part that begins at a column have, as `packed_operand.group_words`. [ROWS, GROUPS]"""
    WIDTH: gl.constexpr = COLUMNS // LAYOUT.shape[1]
    return group_words(ptrs, stride_k, exist, column, WIDTH, K, SCALE_COLUMNS, LAYOUT)


@triton.constexpr_function
def in_two(STORED, FORMAT: str, DTYPE) -> bool:
    """Whether a scale stored as STORED becomes two of DTYPE: bfloat16 is all that has its range and not its bits."""
    return FORMAT != "mxfp4_w4a16" and DTYPE.is_bf16() and STORED != DTYPE


@gluon.jit
def factors(words, STORED: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr, SIZE: gl.constexpr):
    """Scales from `part_words`, of dtype STORED in memory, for each weight of a plane. [ROWS, GROUPS, SIZE] and rest

    Where DTYPE does not hold them they come in fp32, or in two: nearest and what that is short of.
    """
    SHAPE: gl.constexpr = (words.shape[0], words.shape[1], SIZE)
    scale = scales_of(words, DTYPE, FORMAT) if FORMAT == "mxfp4_w4a16" else as_stored(words, STORED)
    rest = scale
    if in_two(STORED, FORMAT, DTYPE):
        exact = scale.to(gl.float32)
        scale = exact.to(DTYPE)
        rest = exact - scale.to(gl.float32)
        # Of infinity there is none, and none of what rounds to it.
        rest = gl.where(rest - rest == 0.0, rest, 0.0).to(DTYPE)
    return scale[:, :, None].broadcast_to(SHAPE), rest[:, :, None].broadcast_to(SHAPE)


@gluon.jit
def numbers(q, offset, factor, plane: gl.constexpr, GROUPED: gl.constexpr, STORED: gl.constexpr, FORMAT: gl.constexpr,
            DTYPE: gl.constexpr, OPERAND: gl.constexpr):  # fmt: skip
    """A plane of a part's codes as numbers of DTYPE, times the scales of their groups if GROUPED. [ROWS, WIDTH]

    offset: from `packed_operand.offsets`. factor: from `factors`, of scales of dtype STORED.
    """
    SHAPE: gl.constexpr = q.shape
    q = gl.convert_layout(q.reshape(offset.shape), offset.type.layout, assert_trivial=True)
    values = plane_numbers(q, offset, plane, FORMAT, DTYPE)
    if GROUPED:
        scale, rest = factor
        if in_two(STORED, FORMAT, DTYPE):
            values = gl.inline_asm_elementwise(
                pair_sum_of_products(), "=r,r,r,r", [values, scale, rest], dtype=offset.dtype, is_pure=True, pack=2
            )
        else:
            values = times(values, scale, DTYPE)
    return gl.convert_layout(values.reshape(SHAPE), OPERAND, assert_trivial=True)
