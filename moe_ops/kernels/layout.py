"""Where a weight's rows lie, and what the compiler has to be told about it."""

import triton
import triton.language as tl


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT, in a form from which the compiler sees it: by itself it knows of multiples of 16 only."""
    return n // UNIT * UNIT


@triton.jit
def weight_rows(n, I, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of one expert's weight that a tile multiplies, and which of them exist. [COLUMNS]

    HALVES: BLOCK_N gate rows, then the BLOCK_N up rows I further on.
    """
    column = tl.arange(0, COLUMNS)
    if HALVES:
        in_half = n + column % BLOCK_N
        return (column // BLOCK_N) * I + in_half, in_half < I
    else:
        return n + column, n + column < I


@triton.jit
def weight_strides(stride_we, stride_wn, stride_wk, N_MAJOR: tl.constexpr, UNIT: tl.constexpr):
    """The strides of a weight, all but the innermost known to be multiples of UNIT."""
    if N_MAJOR:
        return multiple(stride_we, UNIT), stride_wn, multiple(stride_wk, UNIT)
    else:
        return multiple(stride_we, UNIT), multiple(stride_wn, UNIT), stride_wk


@triton.jit
def row_ptrs(ptr, experts, rows, stride_e, stride_n):
    """Where something that rows of an expert's weights have starts."""
    return ptr + experts.to(tl.int64) * stride_e + rows.to(tl.int64) * stride_n


@triton.jit
def plane_stride(K, PLANES: tl.constexpr):
    """Elements from one plane of a row in planes to the next: TMA steps over 16 bytes at least."""
    return (K // PLANES + 7) // 8 * 8


@triton.jit
def in_planes(columns, K, PLANES: tl.constexpr):
    """Where the columns of a row are that is kept in planes: those with one remainder by PLANES side by side."""
    if PLANES == 1:
        return columns
    else:
        return (columns % PLANES) * plane_stride(K, PLANES) + columns // PLANES
