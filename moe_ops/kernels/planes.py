"""Rows of x in planes, as weights with several to a stored element multiply them."""

import triton
import triton.language as tl

from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait
from moe_ops.kernels.layout import in_planes, plane_stride


@triton.jit
def planes_kernel(
    x_ptr, out_ptr, K, stride_xm, stride_xk, stride_om,
    PLANES: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r] = x[r] with the columns in planes (`layout.in_planes`); a program: BLOCK_K columns of a row.

    It runs beside the launch before it and ends after it, as `quantize.quantize_kernel` does for hidden states.
    """
    if PDL:
        gdc_launch_dependents()
    end = plane_stride(K, PLANES) * PLANES
    num_k = tl.cdiv(end, BLOCK_K)
    row = (tl.program_id(0) // num_k).to(tl.int64)
    columns = (tl.program_id(0) % num_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * stride_xm + columns.to(tl.int64) * stride_xk, mask=columns < K, other=0.0)
    tl.store(out_ptr + row * stride_om + in_planes(columns, K, PLANES), x, mask=columns < end)
    if PDL:
        gdc_wait()


@triton.jit
def scatter_planes_kernel(
    x_ptr, out_ptr, inverse_ptr, M, K, stride_xm, stride_xk, stride_om,
    TOP_K: tl.constexpr, PLANES: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[inverse[m, k]] = x[m], in parts of PART columns; a program: BLOCK columns of ROWS tokens.

    Column PLANES * j + i of a part is its column PART / PLANES * i + j in out. The last part ends with zeros; rows
    without a route are left as they are. A token is read once, however many routes it has.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    end = tl.cdiv(K, PART) * PART
    num_k = tl.cdiv(end, BLOCK)
    tokens = (tl.program_id(0) // num_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % num_k * BLOCK
    columns = first + tl.arange(0, BLOCK)
    x_ptrs = x_ptr + tokens[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    x = tl.load(x_ptrs, mask=(tokens < M)[:, None] & (columns < K)[None, :], other=0.0)
    # A thread stores the columns that it has loaded, a plane after the other.
    even, odd = x.reshape(ROWS, BLOCK // 2, 2).split()
    if PLANES == 4:
        plane0, plane2 = even.reshape(ROWS, BLOCK // 4, 2).split()
        plane1, plane3 = odd.reshape(ROWS, BLOCK // 4, 2).split()
    j = tl.arange(0, BLOCK // PLANES)
    place = first + j // (PART // PLANES) * PART + j % (PART // PLANES)
    for k in range(TOP_K):
        rows = tl.load(inverse_ptr + tokens * TOP_K + k, mask=tokens < M, other=-1).to(tl.int64)
        out_ptrs = out_ptr + rows[:, None] * stride_om + place[None, :]
        mask = (rows >= 0)[:, None] & (place < end)[None, :]
        if PLANES == 2:
            tl.store(out_ptrs, even, mask=mask)
            tl.store(out_ptrs + PART // 2, odd, mask=mask)
        else:
            tl.store(out_ptrs, plane0, mask=mask)
            tl.store(out_ptrs + PART // 4, plane1, mask=mask)
            tl.store(out_ptrs + PART // 2, plane2, mask=mask)
            tl.store(out_ptrs + 3 * PART // 4, plane3, mask=mask)
