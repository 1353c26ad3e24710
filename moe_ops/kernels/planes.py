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
