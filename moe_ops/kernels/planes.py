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
def gather_planes_kernel(
    x_ptr, out_ptr, sorted_routes_ptr, num_padded_ptr, num_routes, K, stride_xm, stride_xk, stride_om,
    TOP_K: tl.constexpr, PLANES: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[p] = x[token of sorted row p], in parts of PART columns; a program: BLOCK columns of ROWS rows.

    Column PLANES * j + i of a part is its column PART / PLANES * i + j in out. The last part ends with zeros; padding
    rows are zeros, and those past the last block left as they are.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    end = tl.cdiv(K, PART) * PART
    num_k = tl.cdiv(end, BLOCK)
    first_row = tl.program_id(0) // num_k * ROWS
    rows = first_row + tl.arange(0, ROWS)
    # Both at once: what these loads wait for is most of the time.
    num_padded = tl.load(num_padded_ptr)
    routes = tl.load(sorted_routes_ptr + rows)
    if first_row < num_padded:
        first = tl.program_id(0) % num_k * BLOCK
        columns = first + tl.arange(0, BLOCK)
        x_ptrs = x_ptr + (routes // TOP_K).to(tl.int64)[:, None] * stride_xm
        mask = (routes < num_routes)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptrs + columns.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0.0)
        j = tl.arange(0, BLOCK // PLANES)
        place = first + j // (PART // PLANES) * PART + j % (PART // PLANES)
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + place[None, :]
        # A thread stores the columns that it has loaded, a plane after the other.
        mask = (place < end)[None, :]
        even, odd = x.reshape(ROWS, BLOCK // 2, 2).split()
        if PLANES == 2:
            tl.store(out_ptrs, even, mask=mask)
            tl.store(out_ptrs + PART // 2, odd, mask=mask)
        else:
            plane0, plane2 = even.reshape(ROWS, BLOCK // 4, 2).split()
            plane1, plane3 = odd.reshape(ROWS, BLOCK // 4, 2).split()
            tl.store(out_ptrs, plane0, mask=mask)
            tl.store(out_ptrs + PART // 4, plane1, mask=mask)
            tl.store(out_ptrs + PART // 2, plane2, mask=mask)
            tl.store(out_ptrs + 3 * PART // 4, plane3, mask=mask)
