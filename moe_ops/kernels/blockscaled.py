"""The up and the down GEMM of fp8 experts with block scales for Hopper (sm_90): persistent and warp-specialised.

A scale belongs to 128 x 128 weights and to 128 columns of a row, so the sum over K is cut every 128 columns: wgmma make
a partial sum of 64 x 128 from zero, which is scaled and added in fp32. While one consumer adds, the other multiplies. A
consumer's tile is 64 rows by two halves of 128 rows of weights each, gate and up or neighbours, and one *turn* of it is
a K step of one half. Six roles share a program of 12 warps:

    _rows c      1 warp each   cp.async  x ---------> rows ring of c -----+
                               TMA       act                              +--> _consume c   4 warps each   wgmma, sums,
    _weights c   1 warp each   TMA       weights ---> weights ring of c --+    (c = 0, 1)   epilogue, TMA store

    SPLIT False   the consumers take the row blocks of 64 in turns; each has its own ring of weights
    SPLIT True    a row block is 128, 64 rows a consumer; both read one ring of weights, twice as deep, of _weights 0

A stage of a ring of rows has a K step, one of weights the half of it that a turn takes. Whoever fills or reads a ring
keeps its place, (stage, parity of the phase to wait for), and goes round by `_next`.

    barrier            arrivals in a phase           who arrives                         who waits, before what
    rows_full[s]       up: 32, one a thread          cp.async of _rows: its rows         the consumer, before the first
                       down: 1 and the bytes         _rows, which announces the bytes    turn of a K step
    rows_empty[s]      1                             the consumer, a turn after the      _rows, before it fills s again
                                                     last one that read s
    weights_full[s]    1 and the bytes               _weights, which announces them      the consumer, before its turn
    weights_empty[s]   1, with SPLIT 2               the consumers, a turn after theirs  _weights, before it fills s

Fillers begin with parity 1, that of the phase before the first: the first time round they do not wait. A filler is at
most a ring ahead of each reader, so that a wait never takes one phase for another of the same parity. What a turn needs
is waited for while the wgmma of the turn before it run: only the additions and the wgmma's own latency are exposed.

Tails. K: TMA fills with zeros past the last column, the gather masks. N: rows of weights past the last one are zeros
(past the gate's: rows of the up half), the TMA store clips their columns. Rows: padding rows are zeros and are stored.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ops.kernels.compat import block_barrier, cp_async, tma_load
from moe_ops.kernels.epilogue import store_groups
from moe_ops.kernels.persistent import PATIENCE, STRETCH, keep_step, tile

# Elements of a group of a row, of either side of a block of weights, and columns of a partial sum.
_GROUP = gl.constexpr(128)
_CONSUMER_ROWS = gl.constexpr(64)
# K steps before the end of a stretch at which it counts as loaded; the rings hold fewer than that of ping-pong.
_EARLY_STEPS = gl.constexpr(2)
# Stages of a consumer's ring of rows.
_ROWS_STAGES = gl.constexpr(3)
# Registers of the threads of consumer 1 and of the other roles; consumer 0 gets what is left.
_UP_REGISTERS = gl.constexpr((224, 56))
_DOWN_REGISTERS = gl.constexpr((232, 40))


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The next place of a ring."""
    following = stage + 1
    again = following == STAGES
    return gl.where(again, 0, following), gl.where(again, phase ^ 1, phase)


@gluon.jit
def _weights(CONSUMER: gl.constexpr, ring, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr,
             N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, HALVES: gl.constexpr,
             BLOCK_M: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """The TMA warp of a ring of weights: both halves of every K step of the consumer's tiles."""
    if CONSUMER == 0 or not SPLIT:
        weights_smem, full, empty = ring
        STAGES: gl.constexpr = weights_smem.shape[0] if SPLIT else weights_smem.shape[0] // 2
        FIRST: gl.constexpr = CONSUMER * STAGES
        STRIDE: gl.constexpr = 1 if SPLIT else 2
        K_STEPS: gl.constexpr = triton.cdiv(K, _GROUP)
        num_m = gl.load(num_padded_ptr) // BLOCK_M
        stage = 0
        phase = 1
        index = 0
        step = CONSUMER
        patience = gl.to_tensor(PATIENCE)
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
        expert = gl.load(tile_experts_ptr + gl.maximum(gl.minimum(block_m, num_m - 1), 0))
        while number < num_m * NUM_N:
            # The next tile's expert is fetched while the ring is full, and so costs no time.
            next_number, next_block_m, next_block_n = tile(step + STRIDE, num_m, NUM_N, GROUP_M)
            next_expert = gl.load(tile_experts_ptr + gl.maximum(gl.minimum(next_block_m, num_m - 1), 0))
            # The last tiles are not for all programs, and of a program's two rings.
            patience = gl.where((step + STRIDE) * gl.num_programs(0) <= num_m * NUM_N, patience, 0)
            for k_step in range(K_STEPS):
                if progress_ptr is not None:
                    if (index % STRETCH == 0) & (index > 0) & (patience > 0):
                        patience = keep_step(progress_ptr, index // STRETCH * STRIDE * gl.num_programs(0), patience)
                    if index % STRETCH == STRETCH - 1 - _EARLY_STEPS:
                        gl.atomic_add(progress_ptr, 1, sem="relaxed")
                index += 1
                for half in gl.static_range(2):
                    mbarrier.wait(empty.index(FIRST + stage), phase)
                    bar = full.index(FIRST + stage)
                    mbarrier.expect(bar, _GROUP * _GROUP)
                    row = _weight_row(block_n, half, N, HALVES)
                    tma_load(weights_desc, [expert, row, k_step * _GROUP], bar, weights_smem.index(FIRST + stage))
                    stage, phase = _next(stage, phase, STAGES)
            number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
            step += STRIDE


@gluon.jit
def _weight_row(block_n, half: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr):
    """The first row of weights of a half of a tile."""
    return half * N + block_n * _GROUP if HALVES else (2 * block_n + half) * _GROUP


@gluon.jit
def _rows(CONSUMER: gl.constexpr, ring, x_ptr, stride_xm, rows_desc, sorted_routes_ptr, num_padded_ptr, num_routes,
          K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr,
          SPLIT: gl.constexpr):  # fmt: skip
    """The warp of a ring of rows: rows of x by route (padding rows zeroed and not read), or by descriptor."""
    rows_smem, full, empty = ring
    FIRST: gl.constexpr = CONSUMER * _ROWS_STAGES
    STRIDE: gl.constexpr = 1 if SPLIT else 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [gl.num_warps(), 1], [1, 0])
    k_offsets = gl.arange(0, _GROUP, gl.SliceLayout(0, LAYOUT))
    offsets_m = gl.arange(0, _CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    stage = 0
    phase = 1
    step = 0 if SPLIT else CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    while number < num_m * NUM_N:
        row = block_m * BLOCK_M + (CONSUMER * _CONSUMER_ROWS if SPLIT else 0)
        if x_ptr is not None:
            routes = gl.load(sorted_routes_ptr + row + offsets_m)
            tokens = (routes // TOP_K).to(gl.int64)
            # Rows start at multiples of 16 bytes, in a form from which the compiler sees it.
            x_ptrs = x_ptr + tokens[:, None] * (stride_xm // 16 * 16) + k_offsets[None, :]
            row_mask = (routes < num_routes)[:, None]
        for k_step in range(triton.cdiv(K, _GROUP)):
            k = k_step * _GROUP
            mbarrier.wait(empty.index(FIRST + stage), phase)
            bar = full.index(FIRST + stage)
            if x_ptr is not None:
                mask = row_mask
                if K % _GROUP != 0:
                    mask = row_mask & (k + k_offsets < K)[None, :]
                cp_async(rows_smem.index(FIRST + stage), x_ptrs + k, mask=mask)
                # Each thread arrives when its copies are complete; without the increment it is counted in advance.
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                mbarrier.expect(bar, _CONSUMER_ROWS * _GROUP)
                tma_load(rows_desc, [row, k], bar, rows_smem.index(FIRST + stage))
            stage, phase = _next(stage, phase, _ROWS_STAGES)
        step += STRIDE
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    async_copy.wait_group(0)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, rows_ring, weights_ring, out_smem, out_desc, scales, epilogue, num_padded_ptr,
             N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr,
             GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr,
             DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, SPLIT: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """The consumer's tiles: the turns of both halves, then the epilogue. FENCE where cp.async wrote the rows."""
    rows_smem, rows_full, rows_empty = rows_ring
    weights_smem, weights_full, weights_empty = weights_ring
    row_scale_ptr, stride_sm, stride_sg, weight_scale_ptr, stride_we, stride_wn, stride_wk = scales
    sorted_routes_ptr, tile_experts_ptr, num_routes = epilogue[:3]
    WEIGHTS_STAGES: gl.constexpr = weights_smem.shape[0] if SPLIT else weights_smem.shape[0] // 2
    WEIGHTS_FIRST: gl.constexpr = 0 if SPLIT else CONSUMER * WEIGHTS_STAGES
    ROWS_FIRST: gl.constexpr = CONSUMER * _ROWS_STAGES
    STRIDE: gl.constexpr = 1 if SPLIT else 2
    K_STEPS: gl.constexpr = triton.cdiv(K, _GROUP)
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    WEIGHT_ROWS: gl.constexpr = 2 * N if GATED else N
    # Where a block of weights ends within the up half, whose first row need not be a block's first.
    CUT: gl.constexpr = _GROUP - N % _GROUP if HALVES else _GROUP
    # Tiles of the up GEMM that would keep too much through the turns for their epilogue, and spill in Triton 3.9: they
    # load the second half's scales a turn later, and compute or load once more what others keep.
    LEAN: gl.constexpr = TOP_K != 0 and (CUT != _GROUP or not GATED)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _GROUP, 32])
    before_cut = (gl.arange(0, _GROUP, gl.SliceLayout(0, LAYOUT)) < CUT)[None, :]
    zero = gl.zeros((_CONSUMER_ROWS, _GROUP), gl.float32, LAYOUT)
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    a = 0
    a_phase = 0
    b = 0
    b_phase = 0
    step = 0 if SPLIT else CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    while number < num_m * NUM_N:
        expert = gl.load(tile_experts_ptr + block_m).to(gl.int64)
        row = block_m * BLOCK_M + (CONSUMER * _CONSUMER_ROWS if SPLIT else 0)
        rows = row + gl.arange(0, _CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))
        row_mask = rows >= 0
        # Always 0, which the compiler does not know. See `_weight_scale`.
        own = rows >> 31
        if TOP_K:
            routes = gl.load(sorted_routes_ptr + rows)
            row_mask = routes < num_routes
            rows = routes // TOP_K
        row_scale_ptrs = row_scale_ptr + rows.to(gl.int64) * stride_sm
        expert_scale_ptr = weight_scale_ptr + expert * stride_we
        first = _weight_row(block_n, 0, N, HALVES)
        second = _weight_row(block_n, 1, N, HALVES)
        ptr0 = expert_scale_ptr + (first // _GROUP).to(gl.int64) * stride_wn
        ptr1 = expert_scale_ptr + (second // _GROUP).to(gl.int64) * stride_wn
        ptr2 = ptr1 + stride_wn
        # Rows of weights that do not exist are zeros, and so are their scales.
        next_row_scale = gl.load(row_scale_ptrs, mask=row_mask, other=0.0)
        next_scale0 = _weight_scale(ptr0, own, first < WEIGHT_ROWS)
        next_scale1 = _weight_scale(ptr1, own, second < WEIGHT_ROWS)
        next_scale2 = _weight_scale(ptr2, own, second + CUT < WEIGHT_ROWS)
        factor0 = next_row_scale * next_scale0
        factor1 = next_row_scale * next_scale1
        factor2 = next_row_scale * next_scale2
        acc0 = gl.zeros((_CONSUMER_ROWS, _GROUP), gl.float32, LAYOUT)
        acc1 = gl.zeros((_CONSUMER_ROWS, _GROUP), gl.float32, LAYOUT)
        # Not `= a`: Triton 3.6 does not carry a name that has the same value before a loop and first in it.
        read_a = 0
        read_b = 0
        mbarrier.wait(rows_full.index(ROWS_FIRST + a), a_phase)
        mbarrier.wait(weights_full.index(WEIGHTS_FIRST + b), b_phase)
        if FENCE:
            fence_async_shared()
        # The branches on `half` keep the assembler from moving the additions of one turn below the wgmma of the next
        # one: two partial sums at a time do not fit into the registers.
        for turn in range(2 * K_STEPS):
            half = turn & 1
            weights = weights_smem.index(WEIGHTS_FIRST + b).reshape((_GROUP, _GROUP)).permute((1, 0))
            pending = warpgroup_mma(rows_smem.index(ROWS_FIRST + a), weights, zero, use_acc=False, is_async=True)
            mbarrier.arrive(weights_empty.index(WEIGHTS_FIRST + read_b), count=1, pred=turn > 0)
            mbarrier.arrive(rows_empty.index(ROWS_FIRST + read_a), count=1, pred=(half == 0) & (turn > 0))
            read_a = a
            read_b = b
            b, b_phase = _next(b, b_phase, WEIGHTS_STAGES)
            next_a, next_a_phase = _next(a, a_phase, _ROWS_STAGES)
            a = gl.where(half == 1, next_a, a)
            a_phase = gl.where(half == 1, next_a_phase, a_phase)
            more = turn + 1 < 2 * K_STEPS
            mbarrier.wait(rows_full.index(ROWS_FIRST + a), a_phase, pred=more & (half == 1))
            mbarrier.wait(weights_full.index(WEIGHTS_FIRST + b), b_phase, pred=more)
            partial = warpgroup_mma_wait(0, deps=(pending,))
            if half == 0:
                acc0 += partial * factor0[:, None]
                group = gl.minimum(turn // 2 + 1, K_STEPS - 1).to(gl.int64)
                if LEAN:
                    factor1 = next_row_scale * next_scale1
                    if CUT != _GROUP:
                        factor2 = next_row_scale * next_scale2
                    group_ptrs = row_scale_ptr + (rows + _zero(a)).to(gl.int64) * stride_sm + group * stride_sg
                else:
                    group_ptrs = row_scale_ptrs + group * stride_sg
                next_row_scale = gl.load(group_ptrs, mask=row_mask, other=0.0)
                next_scale0 = _weight_scale(ptr0 + group * stride_wk, own, first < WEIGHT_ROWS)
                if not LEAN:
                    next_scale1 = _weight_scale(ptr1 + group * stride_wk, own, second < WEIGHT_ROWS)
            else:
                factor = factor1[:, None]
                if CUT != _GROUP:
                    factor = gl.where(before_cut, factor, factor2[:, None])
                acc1 += partial * factor
                factor0 = next_row_scale * next_scale0
                if LEAN:
                    group = gl.minimum(turn // 2 + 1, K_STEPS - 1).to(gl.int64)
                    next_scale1 = _weight_scale(ptr1 + group * stride_wk, own, second < WEIGHT_ROWS)
                    if CUT != _GROUP:
                        next_scale2 = _weight_scale(ptr2 + group * stride_wk, own, second + CUT < WEIGHT_ROWS)
                else:
                    factor1 = next_row_scale * next_scale1
                if FENCE:
                    # cp.async writes through the generic proxy and wgmma reads through the async proxy; see pingpong.
                    fence_async_shared()
        mbarrier.arrive(weights_empty.index(WEIGHTS_FIRST + read_b), count=1)
        mbarrier.arrive(rows_empty.index(ROWS_FIRST + read_a), count=1)
        if LEAN:
            row += _zero(a)
        store_groups(acc0, acc1, out_smem.index(CONSUMER), out_desc, epilogue, expert, row, block_n, first, second, N,
                     GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE)  # fmt: skip
        step += STRIDE
        if LEAN:
            num_m = gl.load(num_padded_ptr) // BLOCK_M
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    tma.store_wait(0)


@gluon.jit
def _zero(stage):
    """0, from a stage: the compiler, which does not know, takes nothing that it is added to out of the loop."""
    return stage >> 31


@gluon.jit
def _weight_scale(ptr, own, exists):
    """A weight's scale, asked for by every row by itself.

    What all threads were known to have in common would go to a register that a warp shares, and a warp waits for such
    a load at once, instead of a K step later.
    """
    return gl.load(ptr + own, mask=exists, other=0.0).to(gl.float32)


@gluon.jit(do_not_specialize=[
    "num_routes", "stride_xm", "stride_sm", "stride_sg", "stride_we", "stride_wn", "stride_wk", "stride_be",
    "stride_am", "stride_ag", "alpha", "limit",
])  # fmt: skip
def blockscaled_kernel(
    x_ptr, rows_desc, weights_desc, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weights_ptr, out_desc,
    act_scale_ptr, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, progress_ptr, num_routes,
    stride_xm, stride_sm, stride_sg, stride_we, stride_wn, stride_wk, stride_be, stride_am, stride_ag, alpha, limit,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, DTYPE: gl.constexpr, PROXY_FENCE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[p, :N] = act(rows[p, :K] @ w[e]^T (* router weight) + bias[e]) for the sorted rows p, by groups of columns.

    A row's scale of group g lies at r * stride_sm + g * stride_sg, r the token or the sorted row; a weight's at
    e * stride_we + (row // 128) * stride_wn + g * stride_wk. The rows are gathered from x (up GEMM), or come by
    `rows_desc` (down GEMM; x_ptr None). The up GEMM's result, rounded to DTYPE, is quantised like the rows, with scales
    at p * stride_am + g * stride_ag. A tile makes BLOCK_N columns of out from 256 rows of w. STAGES: of one consumer's
    ring of weights. The boxes of the descriptors are those of `backends.blockscaled`.
    """
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    GATHER: gl.constexpr = x_ptr is not None
    SPLIT: gl.constexpr = BLOCK_M == 2 * _CONSUMER_ROWS
    ROUTES: gl.constexpr = TOP_K if GATHER else 0
    FENCE: gl.constexpr = PROXY_FENCE and GATHER
    REGISTERS: gl.constexpr = _UP_REGISTERS if GATHER else _DOWN_REGISTERS
    ROWS_DTYPE: gl.constexpr = x_ptr.dtype.element_ty if GATHER else rows_desc.dtype
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    rows_smem = gl.allocate_shared_memory(ROWS_DTYPE, [2 * _ROWS_STAGES, _CONSUMER_ROWS, _GROUP], ROWS_LAYOUT)
    weights_smem = gl.allocate_shared_memory(weights_desc.dtype, [2 * STAGES, 1, _GROUP, _GROUP], weights_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_shape, out_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [2 * _ROWS_STAGES, 1], BARRIER)
    rows_empty = gl.allocate_shared_memory(gl.int64, [2 * _ROWS_STAGES, 1], BARRIER)
    weights_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    weights_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    for i in gl.static_range(2 * _ROWS_STAGES):
        mbarrier.init(rows_full.index(i), count=32 if GATHER else 1)
        mbarrier.init(rows_empty.index(i), count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(weights_empty.index(i), count=2 if SPLIT else 1)
    fence_async_shared()
    block_barrier()
    rows_ring = (rows_smem, rows_full, rows_empty)
    weights_ring = (weights_smem, weights_full, weights_empty)
    scales = (row_scale_ptr, stride_sm, stride_sg, weight_scale_ptr, stride_we, stride_wn, stride_wk)
    epilogue = (sorted_routes_ptr, tile_experts_ptr, num_routes, bias_ptr, stride_be, router_weights_ptr, act_scale_ptr,
                stride_am, stride_ag, alpha, limit)  # fmt: skip
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume, (0, rows_ring, weights_ring, out_smem, out_desc, scales, epilogue, num_padded_ptr, N, K, NUM_N,
                    GROUP_M, ROUTES, GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE, BLOCK_M, SPLIT, FENCE)),
        (_consume, (1, rows_ring, weights_ring, out_smem, out_desc, scales, epilogue, num_padded_ptr, N, K, NUM_N,
                    GROUP_M, ROUTES, GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE, BLOCK_M, SPLIT, FENCE)),
        (_rows, (0, rows_ring, x_ptr, stride_xm, rows_desc, sorted_routes_ptr, num_padded_ptr, num_routes, K, NUM_N,
                 GROUP_M, TOP_K, BLOCK_M, SPLIT)),
        (_rows, (1, rows_ring, x_ptr, stride_xm, rows_desc, sorted_routes_ptr, num_padded_ptr, num_routes, K, NUM_N,
                 GROUP_M, TOP_K, BLOCK_M, SPLIT)),
        (_weights, (0, weights_ring, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, N, K, NUM_N,
                    GROUP_M, HALVES, BLOCK_M, SPLIT)),
        (_weights, (1, weights_ring, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, N, K, NUM_N,
                    GROUP_M, HALVES, BLOCK_M, SPLIT)),
    ], [4, 1, 1, 1, 1], [REGISTERS[0], REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]])  # fmt: skip
