"""One token in two launches: matrix-vector products of each route, without a sort and without tensor cores.

One token's routes go to different experts, so every weight is used once, and its bytes are all that counts: a row of
weights times a vector, in fp32, straight from registers. Many small programs keep the memory busy.

    up      act[r] = act(w1[e] @ x[token of r] ...)                  a program: a route, BLOCK_N columns of act
    down    out[m] = factor * sum_k weight[m, k] * (w2[e] @ act[r])  a program: a token, BLOCK_N columns of out

The down launch takes all routes of its token, and so the combine with it. It may start while the up launch ends (PDL):
it then has its first weights in flight before it waits for act.

Quantised weights (FORMAT, the op's `quantization`) become numbers in registers. The activations are not rounded to
their format here: it would take launches of its own, and nothing is gained.
"""

import triton
import triton.language as tl

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait
from moe_ops.kernels.dequantize import no_zero, plane_values, scale_rows, scale_values, zero_rows, zero_values
from moe_ops.kernels.layout import multiple, row_ptrs, weight_rows, weight_strides
from moe_ops.kernels.route import local_experts


@triton.jit
def _load_v(v_ptrs, v_mask, k, K, stride_vk, scale_ptr, stride_group, EVEN_K: tl.constexpr):
    """Columns k of the vectors, in fp32, with their own scales if they have any."""
    v = tl.load(v_ptrs + k.to(tl.int64) * stride_vk, mask=v_mask if EVEN_K else v_mask & (k < K), other=0.0)
    v = v.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + (k // 128).to(tl.int64) * stride_group, mask=k < K, other=0.0)
        v *= scale
    return v


@triton.jit
def _plane(w, plane: tl.constexpr, PLANES: tl.constexpr, FORMAT: tl.constexpr):
    # bfloat16 has all codes exactly.
    return plane_values(w, None, plane, PLANES, tl.bfloat16, FORMAT).to(tl.float32)


@triton.jit
def _products(w, v, FORMAT: tl.constexpr, PLANES: tl.constexpr):
    """What is stored in one place, times its column of v or its PLANES columns, in fp32."""
    if PLANES == 1:
        return w.to(tl.float32) * v
    elif PLANES == 2:
        v0, v1 = v.reshape(v.shape[0], v.shape[1] // 2, 2).split()
        return _plane(w, 0, 2, FORMAT) * v0 + _plane(w, 1, 2, FORMAT) * v1
    else:
        even, odd = v.reshape(v.shape[0], v.shape[1] // 4, 2, 2).split()
        v0, v2 = even.split()
        v1, v3 = odd.split()
        products = _plane(w, 0, 4, FORMAT) * v0 + _plane(w, 1, 4, FORMAT) * v1
        return products + _plane(w, 2, 4, FORMAT) * v2 + _plane(w, 3, 4, FORMAT) * v3


@triton.jit
def _row_dots(w_ptrs, w_mask, rows, scale_ptrs, zero_ptrs, v_ptrs, v_mask, v_scale_ptr, stride_wk, stride_sk, stride_zk,
              stride_vk, stride_vg, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
              N_MAJOR: tl.constexpr, WAIT: tl.constexpr, FORMAT: tl.constexpr,
              SCALE_COLUMNS: tl.constexpr, PLANES: tl.constexpr):  # fmt: skip
    """sum_k w[row, k] * v[row, k] in fp32. [ROWS]; v may be one vector for all rows.

    A step's operands are asked for a step ahead. What a thread has loaded at once it adds up at once: a sum per element
    would take the registers that loads on their way need. WAIT: v comes from the launch before this one.

    BLOCK_K counts what is stored: where weights share an element, a step has PLANES * BLOCK_K columns. What is added
    up at once has one scale, which it is then multiplied with.
    """
    # Of k, in 16 bytes; N-major, a thread has rows side by side.
    VECTOR: tl.constexpr = 1 if N_MAJOR else min(128 // w_ptrs.dtype.element_ty.primitive_bitwidth, BLOCK_K)
    PARTS: tl.constexpr = BLOCK_K // VECTOR
    stored_k = K // PLANES
    k = tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((ROWS, PARTS), tl.float32)
    w = tl.load(w_ptrs + k.to(tl.int64) * stride_wk, mask=w_mask if EVEN_K else w_mask & (k < stored_k), other=0.0)
    if WAIT:
        gdc_wait()
    v_k = tl.arange(0, PLANES * BLOCK_K)[None, :]
    v = _load_v(v_ptrs, v_mask, v_k, K, stride_vk, v_scale_ptr, stride_vg, EVEN_K)
    for first in range(0, stored_k, BLOCK_K):
        k += BLOCK_K
        v_k += PLANES * BLOCK_K
        next_w = tl.load(w_ptrs + k.to(tl.int64) * stride_wk, mask=w_mask & (k < stored_k), other=0.0)
        next_v = _load_v(v_ptrs, v_mask, v_k, K, stride_vk, v_scale_ptr, stride_vg, False)
        part = tl.sum(_products(w, v, FORMAT, PLANES).reshape(ROWS, PARTS, VECTOR), 2)
        if SCALE_COLUMNS > 0:
            group = (first + tl.arange(0, PARTS)[None, :] * VECTOR) * PLANES // SCALE_COLUMNS
            there = w_mask & (group * SCALE_COLUMNS < K)
            scale = scale_values(
                tl.load(scale_ptrs[:, None] + group.to(tl.int64) * stride_sk, mask=there, other=0), FORMAT
            )
            if zero_ptrs is not None:
                zero = zero_values(zero_ptrs[:, None] + group.to(tl.int64) * stride_zk, rows[:, None], there, FORMAT)
                part -= (zero - no_zero(FORMAT)) * tl.sum(v.reshape(v.shape[0], PARTS, VECTOR * PLANES), 2)
            part *= scale
        acc += part
        w, v = next_w, next_v
    dots = tl.sum(acc, 1)
    if FORMAT != "none" and SCALE_COLUMNS == 0:
        dots *= tl.load(scale_ptrs, mask=tl.reshape(w_mask, (ROWS,)), other=0.0).to(tl.float32)
    return dots


@triton.jit(do_not_specialize=["num_routes", "num_ids", "num_experts", "top_k", "alpha", "limit"])
def gemv_up_kernel(
    x_ptr, w_ptr, bias_ptr, router_weights_ptr, act_ptr, ids_ptr, map_ptr,
    num_routes, num_ids, num_experts, top_k, H, I, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_be, stride_am,
    x_scale_ptr, stride_xsm, stride_xsg, w_scale_ptr, stride_se, stride_sn, stride_sk,
    w_zero_ptr, stride_ze, stride_zn, stride_zk,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_LIMIT: tl.constexpr,
    N_MAJOR: tl.constexpr, H_UNIT: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
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
    scale_ptrs, zero_ptrs = w_scale_ptr, w_zero_ptr
    if w_scale_ptr is not None:
        scale_ptrs = row_ptrs(w_scale_ptr, expert, scale_rows(w_rows, SCALE_ROWS), stride_se, stride_sn)
    if w_zero_ptr is not None:
        zero_ptrs = row_ptrs(w_zero_ptr, expert, zero_rows(w_rows, FORMAT), stride_ze, stride_zn)
    if x_scale_ptr is not None:
        x_scale_ptr += (route // top_k).to(tl.int64) * stride_xsm
    y = _row_dots(w_ptrs, w_mask[:, None], w_rows, scale_ptrs, zero_ptrs, x_ptrs, tl.full((1, 1), True, tl.int1),
                  x_scale_ptr, stride_wk, stride_sk, stride_zk, stride_xk, stride_xsg, H, COLUMNS, BLOCK_K, EVEN_K,
                  N_MAJOR, False, FORMAT, SCALE_COLUMNS, PLANES)  # fmt: skip
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
    w_scale_ptr, stride_se, stride_sn, stride_sk, w_zero_ptr, stride_ze, stride_zn, stride_zk,
    N_MAJOR: tl.constexpr, I_UNIT: tl.constexpr, W_UNIT: tl.constexpr, EVEN_K: tl.constexpr,
    SLOTS: tl.constexpr, REDUCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, PLANES: tl.constexpr,
    PDL: tl.constexpr,
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
        scale_ptrs, zero_ptrs = w_scale_ptr, w_zero_ptr
        if w_scale_ptr is not None:
            scale_ptrs = row_ptrs(w_scale_ptr, experts, scale_rows(columns, SCALE_ROWS), stride_se, stride_sn)
        if w_zero_ptr is not None:
            zero_ptrs = row_ptrs(w_zero_ptr, experts, zero_rows(columns, FORMAT), stride_ze, stride_zn)
        y = _row_dots(w_ptrs[:, None], mask[:, None], columns, scale_ptrs, zero_ptrs, act_ptrs[:, None], kept[:, None],
                      None, stride_wk, stride_sk, stride_zk, 1, 0, I, ROWS, BLOCK_K, EVEN_K, N_MAJOR, PDL, FORMAT,
                      SCALE_COLUMNS, PLANES)  # fmt: skip
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
