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
    x_ptr, out_ptr, sorted_routes_ptr, num_padded_ptr, num_routes, K, stride_xm, stride_xk, max_rows, stride_om,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[i, p, j] = x[token of sorted row p, 2 j + i]; a program: BLOCK columns of a plane, of a row. Padding is 0.

    Plane i begins max_rows rows after the one before it. Rows past the last block are left as they are.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_j = tl.cdiv(K // 2, BLOCK)
    row = tl.program_id(0) // num_j
    if row < tl.load(num_padded_ptr):
        route = tl.load(sorted_routes_ptr + row)
        token = (route // TOP_K).to(tl.int64)
        first = (tl.program_id(0) % num_j) * BLOCK
        columns = 2 * first + tl.arange(0, 2 * BLOCK)
        end = tl.where(route < num_routes, K, 0)
        x = tl.load(x_ptr + token * stride_xm + columns.to(tl.int64) * stride_xk, mask=columns < end, other=0.0)
        even, odd = x.reshape(BLOCK, 2).split()
        place = first + tl.arange(0, BLOCK)
        out_ptrs = out_ptr + row.to(tl.int64) * stride_om + place
        tl.store(out_ptrs, even, mask=place < K // 2)
        tl.store(out_ptrs + max_rows.to(tl.int64) * stride_om, odd, mask=place < K // 2)
