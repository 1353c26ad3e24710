"""The up and the down GEMM of the experts: one row block of one expert and one block of columns per program.

The rows are the routes sorted by expert, every expert padded to BLOCK_M (`kernels.route`). Both GEMMs share one
mainloop; where an operand comes from is a constexpr: the weights through a TMA descriptor or pointers of any strides,
the rows gathered by pointers (up), through a TMA descriptor or by pointers from the sorted workspace (down). SWAP_AB
multiplies weights @ rows^T instead of rows @ weights^T: the tensor cores' tall operand is then the weights, and a block
of 16 rows wastes nothing. Quantised weights are one more such choice, FORMAT: the op's `quantization`; strides of w
along K then count what is stored, two weights a byte where it is packed.

The grid is for as many row blocks as there can be; where one is not there, it has no expert. To load the number of
blocks first would put another trip to memory before the first weights.

PDL (programmatic dependent launch): a kernel may start while its predecessor finishes. It waits before it reads what
the predecessor wrote, and lets its successor start after its mainloop; earlier, the successor's programs would take
shared memory from this kernel's last ones.

Boxes of the weight descriptors, so that rows past an expert's last are zero and never the next expert's:

    K-major        [E, N, K]      box [1, BLOCK_N, BLOCK_K]
    K-major halves [E, 2, I, K]   box [1, 2, BLOCK_N, BLOCK_K]
    N-major        [E, K, N]      box [1, BLOCK_K, BLOCK_N]
    N-major halves [E, K, 2, I]   box [1, BLOCK_K, 2, BLOCK_N]
"""

import triton
import triton.language as tl

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait
from moe_ops.kernels.dequantize import plane_values, scale_rows, scaled, scales_of, zero_rows, zero_values
from moe_ops.kernels.layout import (
    UNIT,
    in_planes,
    multiple,
    plane_stride,
    row_ptrs,
    unit_order,
    weight_rows,
    weight_strides,
)


@triton.jit
def tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program -> (row block, column block): GROUP_M row blocks sweep the columns together and share weights in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    group = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % group, (pid % width) // group


@triton.jit
def _weight_tile(w_desc, expert, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
                 N_MAJOR: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One TMA box of weights. [BLOCK_K, COLUMNS]"""
    if N_MAJOR:
        if HALVES:
            box = w_desc.load([expert, k, 0, n])
        else:
            box = w_desc.load([expert, k, n])
        return box.reshape(BLOCK_K, COLUMNS)
    else:
        if HALVES:
            box = w_desc.load([expert, 0, n, k])
        else:
            box = w_desc.load([expert, n, k])
        return box.reshape(COLUMNS, BLOCK_K).T


@triton.jit
def _rows_tile(a_desc, a_ptrs, a_row, row_mask, stride_ak, plane, k, K, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
               EVEN_K: tl.constexpr, PLANES: tl.constexpr):  # fmt: skip
    """Columns k of a plane of the rows. [BLOCK_M, STEP]"""
    if a_desc is not None:
        if PLANES == 1:
            return a_desc.load([a_row, k])
        else:
            return a_desc.load([a_row, plane, k]).reshape(BLOCK_M, STEP)
    else:
        columns = k + tl.arange(0, STEP)
        # A plane ends with zeros.
        end = K if PLANES == 1 else plane_stride(K, PLANES)
        mask = row_mask[:, None]
        if not EVEN_K:
            mask = row_mask[:, None] & (columns < end)[None, :]
        return tl.load(a_ptrs + (plane * end + columns).to(tl.int64)[None, :] * stride_ak, mask=mask, other=0.0)


@triton.jit
def _group_ptrs(ptrs, stride_k, mask, k, K, PARTS: tl.constexpr, PART: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
                EVEN_K: tl.constexpr):  # fmt: skip
    """Where scales or zero points of PARTS of PART columns each from k on are, and which there are. [COLUMNS, PARTS]"""
    part = tl.arange(0, PARTS)[None, :]
    if PART == SCALE_COLUMNS:
        # In a form from which the compiler sees that they are side by side, and how they are aligned.
        group = k // (PARTS * PART) * PARTS + part
    else:
        group = k // SCALE_COLUMNS + part * PART // SCALE_COLUMNS
    there = mask[:, None]
    if not EVEN_K:
        there = there & (k + part * PART < K)
    return ptrs[:, None] + group.to(tl.int64) * stride_k, there


@triton.jit
def _group_scales(ptrs, stride_k, mask, k, K, PARTS: tl.constexpr, PART: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
                  EVEN_K: tl.constexpr):  # fmt: skip
    """Scales as they are stored, as `_group_ptrs` has them. [COLUMNS, PARTS]"""
    ptrs, mask = _group_ptrs(ptrs, stride_k, mask, k, K, PARTS, PART, SCALE_COLUMNS, EVEN_K)
    return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _accumulate(a_desc, a_ptrs, a_row, row_mask, stride_ak, w_desc, w_ptr, expert, n, N, K, first, end,
                stride_we, stride_wn, stride_wk, a_scale_ptrs, stride_ag, w_scales, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, N_MAJOR: tl.constexpr,
                COLUMNS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, SWAP_AB: tl.constexpr,
                FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
                PLANES: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The mainloop: rows @ weights^T over columns `first` to `end` of K, in fp32, with all scales. [BLOCK_M, COLUMNS]

    Quantised rows and weights are multiplied as they are stored; scales that change along K make a product of each step
    and add it up in fp32, the others come at the end. Quantised weights alone are made numbers of the rows' dtype; a
    step in one group of columns scales its product, a longer one the weights.
    """
    ROWS_TOO: tl.constexpr = FORMAT == "fp8_w8a8" or FORMAT == "int8_w8a8"
    WEIGHTS_ONLY: tl.constexpr = FORMAT != "none" and not ROWS_TOO
    # Of what is stored, which has a column of each plane.
    STEP: tl.constexpr = BLOCK_K // PLANES
    STEP_BY_STEP: tl.constexpr = SCALE_COLUMNS > 0 and (ROWS_TOO or BLOCK_K <= SCALE_COLUMNS)
    # A step's sum by itself: Hopper adds fp8 products with fewer bits than fp32, and where the weights are made between
    # the products, ptxas would make each wgmma wait for the one before if the loop carried their accumulator.
    APART: tl.constexpr = STEP_BY_STEP or FORMAT == "fp8_w8a8" or (WEIGHTS_ONLY and SCALE_COLUMNS > 0)
    IN_INTEGERS: tl.constexpr = FORMAT == "int8_w8a8" and not STEP_BY_STEP
    # Parts of a step that have one scale: all of it, units of rows in planes, or groups.
    PARTS: tl.constexpr = (
        1 if SCALE_COLUMNS == 0 or STEP_BY_STEP else STEP // UNIT if PLANES > 1 else BLOCK_K // SCALE_COLUMNS
    )
    PART: tl.constexpr = BLOCK_K // PARTS
    step_offsets = tl.arange(0, STEP)
    w_rows, w_mask = weight_rows(n, N, BLOCK_N, HALVES, COLUMNS)
    if w_desc is None:
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + w_rows.to(tl.int64)[None, :] * stride_wn
    if FORMAT != "none":
        scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk = w_scales
        scale_ptrs = row_ptrs(scale_ptr, expert, scale_rows(w_rows, SCALE_ROWS), stride_se, stride_sn)
        if WEIGHTS_ONLY and STEP_BY_STEP:
            # A step ahead: nothing else would cover the way to memory of loads this small.
            next_scale = _group_scales(scale_ptrs, stride_sk, w_mask, first, K, 1, BLOCK_K, SCALE_COLUMNS, False)
        if zero_ptr is not None:
            zero_ptrs = row_ptrs(zero_ptr, expert, zero_rows(w_rows, FORMAT), stride_ze, stride_zn)
    acc = tl.zeros((COLUMNS, BLOCK_M) if SWAP_AB else (BLOCK_M, COLUMNS), tl.int32 if IN_INTEGERS else tl.float32)
    for k in range(first, end, BLOCK_K):
        stored = k // PLANES
        if w_desc is not None:
            w = _weight_tile(w_desc, expert, n, stored, BLOCK_N, STEP, HALVES, N_MAJOR, COLUMNS)
        elif EVEN_K:
            w = tl.load(w_ptrs + (stored + step_offsets).to(tl.int64)[:, None] * stride_wk, mask=w_mask[None, :],
                        other=0.0)  # fmt: skip
        else:
            w = tl.load(w_ptrs + (stored + step_offsets).to(tl.int64)[:, None] * stride_wk,
                        mask=(stored + step_offsets < K // PLANES)[:, None] & w_mask[None, :], other=0.0)  # fmt: skip
        zero = None
        if WEIGHTS_ONLY:
            w = w.T
            if PLANES > 1:
                w = unit_order(w)
            if STEP_BY_STEP:
                scale = scales_of(next_scale, tl.float32, FORMAT)
                next_scale = _group_scales(
                    scale_ptrs, stride_sk, w_mask, k + BLOCK_K, K, 1, BLOCK_K, SCALE_COLUMNS, False
                )
            elif SCALE_COLUMNS > 0:
                # Not a step ahead: what the loop carries keeps Triton from making the weights in registers.
                scale = _group_scales(scale_ptrs, stride_sk, w_mask, k, K, PARTS, PART, SCALE_COLUMNS, EVEN_K)
                scale = scales_of(scale, dtype, FORMAT)
            if zero_ptr is not None:
                ptrs, there = _group_ptrs(zero_ptrs, stride_zk, w_mask, k, K, PARTS, PART, SCALE_COLUMNS, EVEN_K)
                zero = zero_values(ptrs, w_rows[:, None], there, FORMAT)
        total = tl.zeros(acc.shape, tl.int32 if FORMAT == "int8_w8a8" else tl.float32) if APART else acc
        for plane in tl.static_range(PLANES):
            a = _rows_tile(a_desc, a_ptrs, a_row, row_mask, stride_ak, plane, stored, K, BLOCK_M, STEP, EVEN_K, PLANES)
            b = w
            if WEIGHTS_ONLY:
                b = plane_values(w, zero, plane, PLANES, dtype, FORMAT)
                if SCALE_COLUMNS > 0 and not STEP_BY_STEP:
                    b = scaled(b, scale, w.dtype, PLANES, dtype)
                b = b.T
            if SWAP_AB:
                total = tl.dot(b.T, a.T, total, input_precision=PRECISION, out_dtype=total.dtype)
            else:
                total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
        if STEP_BY_STEP:
            if WEIGHTS_ONLY:
                acc += total * (scale if SWAP_AB else scale.T)
            else:
                a_scale = tl.load(a_scale_ptrs + tl.cast(k // 128, tl.int64) * stride_ag, mask=row_mask, other=0.0)
                w_scale = tl.load(
                    scale_ptrs + tl.cast(k // SCALE_COLUMNS, tl.int64) * stride_sk, mask=w_mask, other=0.0
                ).to(tl.float32)
                if SWAP_AB:
                    acc += total.to(tl.float32) * (w_scale[:, None] * a_scale[None, :])
                else:
                    acc += total.to(tl.float32) * (a_scale[:, None] * w_scale[None, :])
        elif APART:
            acc += total
        else:
            acc = total
    if SWAP_AB:
        acc = acc.T
    if FORMAT != "none" and SCALE_COLUMNS == 0:
        acc = acc.to(tl.float32) * tl.load(scale_ptrs, mask=w_mask, other=0.0).to(tl.float32)[None, :]
        if ROWS_TOO:
            acc *= tl.load(a_scale_ptrs, mask=row_mask, other=0.0)[:, None]
    return acc


@triton.jit(do_not_specialize=["num_routes", "top_k", "alpha", "limit"])
def up_kernel(
    x_ptr, w_desc, w_ptr, bias_ptr, router_weights_ptr, act_ptr,
    sorted_routes_ptr, tile_experts_ptr, num_routes, top_k, H, I, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_be, stride_am,
    x_scale_ptr, stride_xsm, stride_xsg, stride_xse, w_scale_ptr, stride_se, stride_sn, stride_sk,
    w_zero_ptr, stride_ze, stride_zn, stride_zk,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_LIMIT: tl.constexpr, H_UNIT: tl.constexpr, I_UNIT: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    N_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    S_UNIT: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[p] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p.

    w1 is seen as gate and up halves (concatenated) or as N = 2 * I or I plain rows (interleaved, no gate); a tile makes
    BLOCK_N columns of act from COLUMNS rows of w1.
    """
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    H, I, stride_xm = multiple(H, H_UNIT), multiple(I, I_UNIT), multiple(stride_xm, X_UNIT)
    stride_se, stride_sn = multiple(stride_se, S_UNIT), multiple(stride_sn, S_UNIT)
    stride_we, stride_wn, stride_wk = weight_strides(stride_we, stride_wn, stride_wk, N_MAJOR, W_UNIT)
    if PDL:
        gdc_wait()
    num_n = tl.cdiv(I, BLOCK_N)
    pid_m, pid_n = tile(tl.program_id(0), tl.num_programs(0) // num_n, num_n, GROUP_M)
    expert = tl.load(tile_experts_ptr + pid_m)
    if expert < 0:
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    routes = tl.load(sorted_routes_ptr + rows)
    row_mask = routes < num_routes
    x_ptrs = x_ptr + (routes // top_k).to(tl.int64)[:, None] * stride_xm

    # First row of the tile in w1, and how many rows there are to stop at.
    n = pid_n * (COLUMNS if INTERLEAVED else BLOCK_N)
    N = 2 * I if INTERLEAVED else I
    x_scale_ptrs = x_scale_ptr
    if x_scale_ptr is not None:
        x_scale_ptrs = row_ptrs(x_scale_ptr, expert, routes // top_k, stride_xse, stride_xsm)
    acc = _accumulate(None, x_ptrs, 0, row_mask, stride_xk, w_desc, w_ptr, expert, n, N, H, 0, H,
                      stride_we, stride_wn, stride_wk, x_scale_ptrs, stride_xsg,
                      (w_scale_ptr, stride_se, stride_sn, stride_sk, w_zero_ptr, stride_ze, stride_zn, stride_zk),
                      BLOCK_M, BLOCK_N, BLOCK_K, HALVES, N_MAJOR, COLUMNS, EVEN_K, PRECISION, SWAP_AB,
                      FORMAT, SCALE_ROWS, SCALE_COLUMNS, PLANES, act_ptr.dtype.element_ty)  # fmt: skip
    if PDL:
        gdc_launch_dependents()

    if router_weights_ptr is not None:
        acc *= tl.load(router_weights_ptr + routes, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        b_rows, b_mask = weight_rows(n, N, BLOCK_N, HALVES, COLUMNS)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + b_rows, mask=b_mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATED:
        if INTERLEAVED:
            gate, up = acc.reshape(BLOCK_M, BLOCK_N, 2).split()
        else:
            gate, up = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit)
    else:
        y = nonlinearity(acc, ACTIVATION, alpha)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    places = in_planes(columns, I, PLANES)
    act_ptrs = act_ptr + rows.to(tl.int64)[:, None] * stride_am
    tl.store(act_ptrs + places[None, :], y.to(act_ptr.dtype.element_ty),
             mask=row_mask[:, None] & (columns < I)[None, :])  # fmt: skip
    if PLANES > 1:
        if pid_n == num_n - 1:
            # The zeros a plane ends with.
            behind = I + tl.arange(0, UNIT * 4 * PLANES)
            tl.store(act_ptrs + in_planes(behind, I, PLANES)[None, :], tl.zeros((1, 1), act_ptr.dtype.element_ty),
                     mask=row_mask[:, None] & (behind < plane_stride(I, PLANES) * PLANES)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["num_routes"])
def down_kernel(
    act_desc, act_ptr, w_desc, w_ptr, bias_ptr, rows_ptr,
    sorted_routes_ptr, tile_experts_ptr, num_routes, H, I,
    stride_am, stride_we, stride_wn, stride_wk, stride_be, stride_rm,
    act_scale_ptr, stride_asm, stride_asg, stride_ase, w_scale_ptr, stride_se, stride_sn, stride_sk,
    w_zero_ptr, stride_ze, stride_zn, stride_zk,
    H_UNIT: tl.constexpr, I_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    N_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    S_UNIT: tl.constexpr, PLANES: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """rows[p] = act[p] @ w2[e]^T + b2[e] for the sorted rows p. Padding rows are computed with, and never stored.

    SPLITS programs share a tile, each with its own steps along K, and its own rows in fp32, which the combine adds up.
    """
    H, I = multiple(H, H_UNIT), multiple(I, I_UNIT)
    stride_se, stride_sn = multiple(stride_se, S_UNIT), multiple(stride_sn, S_UNIT)
    stride_we, stride_wn, stride_wk = weight_strides(stride_we, stride_wn, stride_wk, N_MAJOR, W_UNIT)
    if PDL:
        gdc_wait()
    num_n = tl.cdiv(H, BLOCK_N)
    num_m = tl.num_programs(0) // SPLITS // num_n
    split = tl.program_id(0) % SPLITS
    pid_m, pid_n = tile(tl.program_id(0) // SPLITS, num_m, num_n, GROUP_M)
    expert = tl.load(tile_experts_ptr + pid_m)
    if expert < 0:
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    routes = tl.load(sorted_routes_ptr + rows)
    row_mask = routes < num_routes
    n = pid_n * BLOCK_N
    first, end = 0, I
    if SPLITS > 1:
        # In whole steps; the last program may have fewer, or none.
        part = tl.cdiv(tl.cdiv(I, BLOCK_K), SPLITS) * BLOCK_K
        first = split * part
        end = tl.minimum(first + part, I)
    a_ptrs = act_ptr + rows.to(tl.int64)[:, None] * stride_am
    act_scale_ptrs = act_scale_ptr
    if act_scale_ptr is not None:
        act_scale_ptrs = row_ptrs(act_scale_ptr, expert, rows, stride_ase, stride_asm)
    acc = _accumulate(act_desc, a_ptrs, pid_m * BLOCK_M, row_mask, 1, w_desc, w_ptr, expert, n, H, I, first, end,
                      stride_we, stride_wn, stride_wk, act_scale_ptrs, stride_asg,
                      (w_scale_ptr, stride_se, stride_sn, stride_sk, w_zero_ptr, stride_ze, stride_zn, stride_zk),
                      BLOCK_M, BLOCK_N, BLOCK_K, False, N_MAJOR, BLOCK_N, EVEN_K, PRECISION, SWAP_AB,
                      FORMAT, SCALE_ROWS, SCALE_COLUMNS, PLANES, act_ptr.dtype.element_ty)  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    columns = n + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        # Of one part alone.
        there = columns < tl.where(split == 0, H, 0)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + columns, mask=there, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    rows += split * num_m * BLOCK_M
    tl.store(rows_ptr + rows.to(tl.int64)[:, None] * stride_rm + columns[None, :], acc.to(rows_ptr.dtype.element_ty),
             mask=row_mask[:, None] & (columns < H)[None, :])  # fmt: skip
