"""The combine: every token's routes, weighted and summed in fp32 in the order of k."""

import triton
import triton.language as tl

from moe_ops.kernels.compat import gdc_wait


@triton.jit(do_not_specialize=["factor", "top_k", "max_rows"])
def combine_kernel(
    rows_ptr, inverse_ptr, router_weights_ptr, out_ptr, factor, top_k, H, max_rows,
    stride_rm, stride_om, stride_ok, stride_oh,
    UNROLL: tl.constexpr, REDUCE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[m] = factor * sum_k weight[m, k] * rows[inverse[m, k]], or the summands themselves (not REDUCE).

    A row is the sum, in this order, of SPLITS rows, max_rows apart.
    A dropped route (inverse -1) contributes exactly 0: neither its weight nor any row is read.
    """
    if PDL:
        gdc_wait()
    num_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // num_h).to(tl.int64)
    columns = (tl.program_id(0) % num_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    out_ptrs = out_ptr + token * stride_om + columns.to(tl.int64) * stride_oh
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, top_k, UNROLL):
        for step in tl.static_range(UNROLL):
            k = first + step
            route = token * top_k + k
            row = tl.load(inverse_ptr + route, mask=k < top_k, other=-1).to(tl.int64)
            # Masks compare columns with a bound: the interpreter cannot AND a vector with a scalar condition.
            mask = columns < tl.where(row >= 0, H, 0)
            value = tl.load(rows_ptr + row * stride_rm + columns, mask=mask, other=0.0).to(tl.float32)
            for split in tl.static_range(1, SPLITS):
                part = row + split * max_rows.to(tl.int64)
                value += tl.load(rows_ptr + part * stride_rm + columns, mask=mask, other=0.0)
            if router_weights_ptr is not None:
                value *= tl.load(router_weights_ptr + route, mask=row >= 0, other=0.0).to(tl.float32)
            if REDUCE:
                total += value
            else:
                tl.store(out_ptrs + k.to(tl.int64) * stride_ok, (value * factor).to(out_ptr.dtype.element_ty),
                         mask=columns < tl.where(k < top_k, H, 0))  # fmt: skip
    if REDUCE:
        tl.store(out_ptrs, (total * factor).to(out_ptr.dtype.element_ty), mask=columns < H)
