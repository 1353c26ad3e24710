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


# Elements of a thread's 16 bytes of a row, and of the four neighbours that share the row in the tensor cores' operand.
UNIT = tl.constexpr(8)
_BLOCK = tl.constexpr(32)


@triton.jit
def plane_stride(K, PLANES: tl.constexpr):
    """Elements from one plane of a row in planes to the next: whole blocks of `unit_order`."""
    return (K // PLANES + _BLOCK - 1) // _BLOCK * _BLOCK


@triton.jit
def in_planes(columns, K, PLANES: tl.constexpr):
    """Where the columns of a row are that is kept in planes: those with one remainder by PLANES side by side.

    Within 32 of a plane, four units of 8, the order is that of `unit_order`.
    """
    if PLANES == 1:
        return columns
    else:
        i = columns // PLANES
        # [block][unit][pair][2] -> [block][pair][unit][2]
        i = i // _BLOCK * _BLOCK + (i // 2 % 4) * UNIT + (i // UNIT % 4) * 2 + i % 2
        return (columns % PLANES) * plane_stride(K, PLANES) + i


@triton.jit
def unit_order(w):
    """Stored weights [N, S] in the order of rows in planes.

    Of 32 elements side by side the tensor cores take pair after pair of each unit of 8, one unit from each of four
    threads. So a thread has its 16 bytes of a row, which it can load at once, and all of it in one group of columns.
    """
    N: tl.constexpr = w.shape[0]
    S: tl.constexpr = w.shape[1]
    return w.reshape(N, S // _BLOCK, 4, UNIT // 2, 2).permute(0, 1, 3, 2, 4).reshape(N, S)


@triton.jit
def by_unit(values, units):
    """values [N, S] in `unit_order`, and one of a unit's [N, S / 8], both as [N, blocks, 4 pairs, 4 units, 2]."""
    N: tl.constexpr = values.shape[0]
    BLOCKS: tl.constexpr = values.shape[1] // _BLOCK
    SHAPE: tl.constexpr = (N, BLOCKS, UNIT // 2, 4, 2)
    return values.reshape(SHAPE), units.reshape(N, BLOCKS, 4)[:, :, None, :, None].broadcast_to(SHAPE)
