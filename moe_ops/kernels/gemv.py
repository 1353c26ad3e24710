"""A token or a few in two launches: matrix-vector products of each route, without a sort and without tensor cores.

One token's routes go to different experts, so every weight is used once, and its bytes are all that counts: a row of
weights times a vector, in fp32, straight from registers. Many small programs keep the memory busy.

    up      act[r] = act(w1[e] @ x[token of r] ...)                  a program: a route, BLOCK_N columns of act
    down    out[m] = factor * sum_k weight[m, k] * (w2[e] @ act[r])  a program: a token, BLOCK_N columns of out

The down launch takes all routes of its token, and so the combine with it. It may start while the up launch ends (PDL):
it then has its first weights in flight before it waits for act.
"""

import triton
import triton.language as tl

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait
from moe_ops.kernels.layout import multiple, weight_rows, weight_strides
from moe_ops.kernels.route import local_experts


@triton.jit
def _row_dots(w_ptrs, w_mask, v_ptrs, v_mask, stride_wk, stride_vk, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
              EVEN_K: tl.constexpr, N_MAJOR: tl.constexpr, WAIT: tl.constexpr):  # fmt: skip
    """sum_k w[row, k] * v[row, k] in fp32. [ROWS]; v may be one vector for all rows.

    A step's operands are asked for a step ahead. What a thread has loaded at once it adds up at once: a sum per element
    would take the registers that loads on their way need. WAIT: v comes from the launch before this one.
    """
    # Of k, in 16 bytes; N-major, a thread has rows side by side.
    VECTOR: tl.constexpr = 1 if N_MAJOR else min(128 // w_ptrs.dtype.element_ty.primitive_bitwidth, BLOCK_K)
    k = tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((ROWS, BLOCK_K // VECTOR), tl.float32)
    w = tl.load(w_ptrs + k.to(tl.int64) * stride_wk, mask=w_mask if EVEN_K else w_mask & (k < K), other=0.0)
    if WAIT:
        gdc_wait()
    v = tl.load(v_ptrs + k.to(tl.int64) * stride_vk, mask=v_mask if EVEN_K else v_mask & (k < K), other=0.0)
    for _ in range(0, K, BLOCK_K):
        k += BLOCK_K
        next_w = tl.load(w_ptrs + k.to(tl.int64) * stride_wk, mask=w_mask & (k < K), other=0.0)
        next_v = tl.load(v_ptrs + k.to(tl.int64) * stride_vk, mask=v_mask & (k < K), other=0.0)
        products = w.to(tl.float32) * v.to(tl.float32)
        acc += tl.sum(products.reshape(ROWS, BLOCK_K // VECTOR, VECTOR), 2)
        w, v = next_w, next_v
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["num_routes", "num_ids", "num_experts", "top_k", "alpha", "limit"])
def gemv_up_kernel(
    x_ptr, w_ptr, bias_ptr, router_weights_ptr, act_ptr, ids_ptr, map_ptr,
    num_routes, num_ids, num_experts, top_k, H, I, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_be, stride_am,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_LIMIT: tl.constexpr,
    N_MAJOR: tl.constexpr, H_UNIT: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[r] = act(w1[e] @ x[token of r] (* router weight) + b1[e]) for the routes r; none for one that is dropped."""
    if PDL:
        gdc_launch_dependents()
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    H, stride_xm = multiple(H, H_UNIT), multiple(stride_xm, X_UNIT)
    stride_we, stride_wn, stride_wk = weight_strides(stride_we, stride_wn, stride_wk, N_MAJOR, W_UNIT)
    num_n = tl.cdiv(I, BLOCK_N)
    route, block_n = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    expert = local_experts(ids_ptr, map_ptr, route, route < num_routes, num_ids, num_experts)
    if expert >= num_experts:
        return
    N = 2 * I if INTERLEAVED else I
    w_rows, w_mask = weight_rows(block_n * (COLUMNS if INTERLEAVED else BLOCK_N), N, BLOCK_N, HALVES, COLUMNS)
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + w_rows.to(tl.int64)[:, None] * stride_wn
    x_ptrs = x_ptr + (route // top_k).to(tl.int64) * stride_xm + tl.zeros((1, 1), tl.int64)
    y = _row_dots(w_ptrs, w_mask[:, None], x_ptrs, tl.full((1, 1), True, tl.int1), stride_wk, stride_xk, H,
                  COLUMNS, BLOCK_K, EVEN_K, N_MAJOR, False)  # fmt: skip
    if router_weights_ptr is not None:
        y *= tl.load(router_weights_ptr + route).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + w_rows, mask=w_mask, other=0.0)
        y += bias.to(tl.float32)
    if GATED:
        if INTERLEAVED:
            gate, up = y.reshape(BLOCK_N, 2).split()
        else:
            gate, up = y.reshape(2, BLOCK_N).permute(1, 0).split()
        y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit)
    else:
        y = nonlinearity(y, ACTIVATION, alpha)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(act_ptr + route.to(tl.int64) * stride_am + columns, y.to(act_ptr.dtype.element_ty), mask=columns < I)


@triton.jit(do_not_specialize=["factor", "num_ids", "num_experts", "top_k"])
def gemv_down_kernel(
    act_ptr, w_ptr, bias_ptr, router_weights_ptr, out_ptr, ids_ptr, map_ptr,
    factor, num_ids, num_experts, top_k, H, I,
    stride_am, stride_we, stride_wn, stride_wk, stride_be, stride_om, stride_ok, stride_oh,
    N_MAJOR: tl.constexpr, I_UNIT: tl.constexpr, W_UNIT: tl.constexpr, EVEN_K: tl.constexpr,
    SLOTS: tl.constexpr, REDUCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[m] = factor * sum_k weight[m, k] * (w2[e] @ act[r] + b2[e]), or the summands themselves (not REDUCE).

    Route r is (m, k). SLOTS routes at a time, in the order of k. A dropped route contributes exactly 0.
    """
    I = multiple(I, I_UNIT)
    stride_we, stride_wn, stride_wk = weight_strides(stride_we, stride_wn, stride_wk, N_MAJOR, W_UNIT)
    ROWS: tl.constexpr = SLOTS * BLOCK_N
    num_n = tl.cdiv(H, BLOCK_N)
    token = tl.program_id(0) // num_n
    first_column = (tl.program_id(0) % num_n) * BLOCK_N
    row = tl.arange(0, ROWS)
    columns = first_column + row % BLOCK_N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, top_k, SLOTS):
        slots = first + row // BLOCK_N
        routes = token * top_k + slots
        experts = local_experts(ids_ptr, map_ptr, routes, slots < top_k, num_ids, num_experts)
        kept = experts < num_experts
        mask = kept & (columns < H)
        w_ptrs = w_ptr + experts.to(tl.int64) * stride_we + columns.to(tl.int64) * stride_wn
        act_ptrs = act_ptr + routes.to(tl.int64) * stride_am
        y = _row_dots(w_ptrs[:, None], mask[:, None], act_ptrs[:, None], kept[:, None], stride_wk, 1, I,
                      ROWS, BLOCK_K, EVEN_K, N_MAJOR, PDL)  # fmt: skip
        if bias_ptr is not None:
            y += tl.load(bias_ptr + experts.to(tl.int64) * stride_be + columns, mask=mask, other=0.0).to(tl.float32)
        if router_weights_ptr is not None:
            y *= tl.load(router_weights_ptr + routes, mask=kept, other=0.0).to(tl.float32)
        if REDUCE:
            total += tl.sum(y.reshape(SLOTS, BLOCK_N), 0)
        else:
            out_ptrs = out_ptr + token.to(tl.int64) * stride_om + slots.to(tl.int64) * stride_ok
            tl.store(out_ptrs + columns.to(tl.int64) * stride_oh, (y * factor).to(out_ptr.dtype.element_ty),
                     mask=(slots < top_k) & (columns < H))  # fmt: skip
    if REDUCE:
        columns = first_column + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + token.to(tl.int64) * stride_om + columns.to(tl.int64) * stride_oh
        tl.store(out_ptrs, (total * factor).to(out_ptr.dtype.element_ty), mask=columns < H)
