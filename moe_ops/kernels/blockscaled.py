"""The up and the down GEMM of fp8 experts with block scales for Hopper (sm_90): persistent and warp-specialised.

A scale belongs to 128 x 128 weights and to 128 columns of a row, so the sum over K is cut every 128 columns: wgmma make
a partial sum of 64 x 128 from zero, which is scaled and added in fp32. While one consumer adds, the other multiplies. A
consumer's tile is 64 rows by two halves of 128 rows of weights each, gate and up or neighbours, and one *turn* of it is
a K step of one half. Six roles share a program of 12 warps:

    fill_rows c     1 warp each   cp.async  x, scales -> rows ring of c -----+
                                  TMA       act                              +--> _consume c   4 warps each
    fill_weights c  1 warp each   TMA       weights ---> weights ring of c --+    wgmma, sums, epilogue, TMA store
                                  stores    scales

    SPLIT False   the consumers take the row blocks of 64 in turns; each has rings of its own
    SPLIT True    a row block is 128, 64 rows a consumer. A stage is all that both read of a K step, so the two rings of
                  rows and that of weights have the same barriers, and fill_weights 1 has nothing to do. A consumer
                  starts the wgmma of a turn after the other one has started its own (`_take_turn`)

A stage of a ring of rows has a K step; one of weights has the half of it that a turn takes, with SPLIT both. Beside the
rows and weights it has their scales.

    barrier            arrivals in a phase         who arrives                        who waits, before what
    rows_full[s]       1, in the down GEMM and     fill_rows: its copies are there,   the consumer, before the
                       the bytes                   or rows announced                  first turn of a K step
                       SPLIT: 3 and the bytes      both fill_rows, fill_weights 0     both consumers
    rows_empty[s]      1, SPLIT: 2                 the consumers, two turns after     fill_rows (SPLIT: fill_weights
                                                   the last one that read s           0 too), before it fills s again
    weights_full[s]    1 and the bytes             fill_weights, which announces      the consumer, before its turn
    weights_empty[s]   1                           the consumer, a turn later         fill_weights, before it fills s

Fillers begin with parity 1, that of the phase before the first: the first time round they do not wait. A filler is at
most a ring ahead of each reader, so that a wait never takes one phase for another of the same parity. What a turn needs
is waited for while the wgmma of the turn before it run, and its factors are multiplied under its own: only the
additions and the wgmma's latency are exposed, and the other consumer's wgmma run meanwhile.

Tails. K: TMA fills with zeros past the last column, the gather masks. N: rows of weights past the last one are zeros
(past the gate's: rows of the up half), the TMA store clips their columns. Rows: padding rows are zeros, and are
not stored, but with SPLIT, and in the up GEMM without a gate.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ops.kernels.compat import block_barrier
from moe_ops.kernels.epilogue import store_groups
from moe_ops.kernels.persistent import CONSUMER_ROWS, routes_of, tile, used_rows
from moe_ops.kernels.rings import (
    GROUP,
    HALF_SCALES,
    cut,
    fill_rows,
    fill_weights,
    next_place,
    weight_row,
)

# Stages of a consumer's ring of rows where it has one of its own.
_ROWS_STAGES = gl.constexpr(3)
# Registers of the threads of consumer 1 and of the other roles; consumer 0 gets what is left. Gathering takes more.
_UP_REGISTERS = gl.constexpr((216, 72))
_DOWN_REGISTERS = gl.constexpr((232, 40))


@gluon.jit
def _consume(CONSUMER: gl.constexpr, rows_ring, weights_ring, out_smem, out_desc, epilogue, num_padded_ptr,
             N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr,
             GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr,
             DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """The consumer's tiles: the turns of both halves, then the epilogue."""
    rows_smem, row_scales, rows_full, rows_empty = rows_ring
    weights_smem, weight_scales, weights_full, weights_empty = weights_ring
    tile_experts_ptr = epilogue[1]
    WEIGHTS_STAGES: gl.constexpr = weights_smem.shape[0] // 2
    WEIGHTS_FIRST: gl.constexpr = 0 if SPLIT else CONSUMER * WEIGHTS_STAGES
    ROWS_STAGES: gl.constexpr = rows_smem.shape[0] // 2
    ROWS_FIRST: gl.constexpr = CONSUMER * ROWS_STAGES
    ROWS_BARRIER: gl.constexpr = 0 if SPLIT else ROWS_FIRST
    STRIDE: gl.constexpr = 1 if SPLIT else 2
    K_STEPS: gl.constexpr = triton.cdiv(K, GROUP)
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    CUT: gl.constexpr = cut(N, HALVES)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUP, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    before_cut = (gl.arange(0, GROUP, gl.SliceLayout(0, LAYOUT)) < CUT)[None, :]
    zero = gl.zeros((CONSUMER_ROWS, GROUP), gl.float32, LAYOUT)
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    a = 0
    a_phase = 0
    b = 0
    b_phase = 0
    step = 0 if SPLIT else CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    sorted_routes_ptr, num_routes = epilogue[0], epilogue[2]
    # Counting takes registers that there are not with SPLIT, nor in the up GEMM without a gate.
    COUNTED: gl.constexpr = not SPLIT and (GATED or ACTIVATION is None)
    if COUNTED:
        routes = routes_of(sorted_routes_ptr, block_m * BLOCK_M, num_m * BLOCK_M, BLOCK_M)
    if SPLIT and CONSUMER == 1:
        _pass_turn(0)
    while number < num_m * NUM_N:
        used = None
        if COUNTED:
            used = used_rows(routes, num_routes)
            next_number, next_block_m, next_block_n = tile(step + STRIDE, num_m, NUM_N, GROUP_M)
            routes = routes_of(sorted_routes_ptr, next_block_m * BLOCK_M, num_m * BLOCK_M, BLOCK_M)
        acc0 = gl.zeros((CONSUMER_ROWS, GROUP), gl.float32, LAYOUT)
        acc1 = gl.zeros((CONSUMER_ROWS, GROUP), gl.float32, LAYOUT)
        # Not `= a`: Triton 3.6 does not carry a name that has the same value before a loop and first in it.
        read_a = 0
        read_b = 0
        mbarrier.wait(rows_full.index(ROWS_BARRIER + a), a_phase)
        if not SPLIT:
            mbarrier.wait(weights_full.index(WEIGHTS_FIRST + b), b_phase)
        for k_step in range(K_STEPS):
            for half in gl.static_range(2):
                box = 2 * a + half if SPLIT else WEIGHTS_FIRST + b
                weights = weights_smem.index(box).reshape((GROUP, GROUP)).permute((1, 0))
                if SPLIT:
                    _take_turn(CONSUMER)
                pending = warpgroup_mma(rows_smem.index(ROWS_FIRST + a), weights, zero, use_acc=False, is_async=True)
                if half == 0:
                    row_scale = row_scales.index(ROWS_FIRST + a).load(ROW)
                    there = _there(a)
                if SPLIT:
                    _pass_turn(1 - CONSUMER)
                scales = weight_scales.index(box)
                factor = _product(row_scale, scales.slice(0, 1).load(ROW))[:, None]
                if half == 1 and CUT != GROUP:
                    after_cut = _product(row_scale, scales.slice(1, 1).load(ROW))[:, None]
                    factor = gl.where(before_cut, factor, after_cut)
                # What the turn before this one has read is given back, and what the next one reads is waited for.
                if not SPLIT:
                    mbarrier.arrive(weights_empty.index(WEIGHTS_FIRST + read_b), count=1, pred=k_step + half > 0)
                    read_b = b
                    b, b_phase = next_place(b, b_phase, WEIGHTS_STAGES)
                    more = k_step + half < K_STEPS
                    mbarrier.wait(weights_full.index(WEIGHTS_FIRST + b), b_phase, pred=more)
                if half == 1:
                    # Both here: with the first in the other half, all threads would meet before this half's wgmma too.
                    mbarrier.arrive(rows_empty.index(ROWS_BARRIER + read_a), count=1, pred=k_step > 0)
                    read_a = a
                    a, a_phase = next_place(a, a_phase, ROWS_STAGES)
                    mbarrier.wait(rows_full.index(ROWS_BARRIER + a), a_phase, pred=k_step + 1 < K_STEPS)
                partial = warpgroup_mma_wait(0, deps=(pending,))
                # A branch that is always taken keeps the assembler from moving the additions of one turn below the
                # wgmma of the next one: two partial sums at a time do not fit into the registers.
                if there:
                    if half == 0:
                        acc0 += partial * factor
                    else:
                        acc1 += partial * factor
        if not SPLIT:
            mbarrier.arrive(weights_empty.index(WEIGHTS_FIRST + read_b), count=1)
        mbarrier.arrive(rows_empty.index(ROWS_BARRIER + read_a), count=1)
        expert = gl.load(tile_experts_ptr + block_m).to(gl.int64)
        row = block_m * BLOCK_M + (CONSUMER * CONSUMER_ROWS if SPLIT else 0)
        first = weight_row(block_n, 0, N, HALVES)
        second = weight_row(block_n, 1, N, HALVES)
        store_groups(acc0, acc1, out_smem.index(CONSUMER), out_desc, epilogue, expert, row, used, block_n, first,
                     second, N, GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE)  # fmt: skip
        step += STRIDE
        if COUNTED:
            number, block_m, block_n = next_number, next_block_m, next_block_n
        else:
            number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    if SPLIT and CONSUMER == 0:
        _take_turn(0)
    tma.store_wait(0)


@gluon.jit
def _there(stage):
    """True, which the compiler does not know."""
    return stage >= 0


@gluon.jit
def _product(a, b):
    """a * b, and not later: it and its loads would be moved behind the wait, into the branch of the additions."""
    return gl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=False, pack=1)


# A consumer starts its wgmma when the other one has started those of its own turn: what comes first is done first, and
# one adds while the other multiplies. Consumer c waits at named barrier _TURN + c, of both consumers' 256 threads, at
# which the other one only arrives (Triton's own are the lowest of the 16). An mbarrier would take time of the shared
# memory's, of which wgmma need most.
_TURN = gl.constexpr(14)


@gluon.jit
def _take_turn(CONSUMER: gl.constexpr):
    _named_barrier("bar.sync $1, 256; mov.b32 $0, $1;", CONSUMER)


@gluon.jit
def _pass_turn(CONSUMER: gl.constexpr):
    _named_barrier("bar.arrive $1, 256; mov.b32 $0, $1;", CONSUMER)


@gluon.jit
def _named_barrier(PTX: gl.constexpr, CONSUMER: gl.constexpr):
    gl.inline_asm_elementwise(
        PTX, "=r,r", [gl.to_tensor(_TURN + CONSUMER)], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


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
    ring of weights; the ring that both read has one less. The boxes of the descriptors are those of
    `backends.blockscaled`.
    """
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    GATHER: gl.constexpr = x_ptr is not None
    SPLIT: gl.constexpr = BLOCK_M == 2 * CONSUMER_ROWS
    REGISTERS: gl.constexpr = _UP_REGISTERS if GATHER else _DOWN_REGISTERS
    ROWS_DTYPE: gl.constexpr = x_ptr.dtype.element_ty if GATHER else rows_desc.dtype
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DEPTH: gl.constexpr = STAGES - 1 if SPLIT else STAGES
    ROWS_STAGES: gl.constexpr = DEPTH if SPLIT else _ROWS_STAGES
    rows_smem = gl.allocate_shared_memory(ROWS_DTYPE, [2 * ROWS_STAGES, CONSUMER_ROWS, GROUP], ROWS_LAYOUT)
    weights_smem = gl.allocate_shared_memory(weights_desc.dtype, [2 * DEPTH, 1, GROUP, GROUP], weights_desc.layout)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_scales = gl.allocate_shared_memory(gl.float32, [2 * ROWS_STAGES, CONSUMER_ROWS], LINE)
    weight_scales = gl.allocate_shared_memory(gl.float32, [2 * DEPTH, HALF_SCALES], LINE)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_shape, out_desc.layout)
    RINGS: gl.constexpr = 1 if SPLIT else 2
    rows_full = gl.allocate_shared_memory(gl.int64, [RINGS * ROWS_STAGES, 1], BARRIER)
    rows_empty = gl.allocate_shared_memory(gl.int64, [RINGS * ROWS_STAGES, 1], BARRIER)
    for i in gl.static_range(RINGS * ROWS_STAGES):
        mbarrier.init(rows_full.index(i), count=3 if SPLIT else 1)
        mbarrier.init(rows_empty.index(i), count=2 if SPLIT else 1)
    weights_full = rows_full
    weights_empty = rows_empty
    if not SPLIT:
        weights_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
        weights_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
        for i in gl.static_range(2 * STAGES):
            mbarrier.init(weights_full.index(i), count=1)
            mbarrier.init(weights_empty.index(i), count=1)
    fence_async_shared()
    block_barrier()
    rows_ring = (rows_smem, row_scales, rows_full, rows_empty)
    weights_ring = (weights_smem, weight_scales, weights_full, weights_empty)
    of_rows = (row_scale_ptr, stride_sm, stride_sg)
    of_weights = (weight_scale_ptr, stride_we, stride_wn, stride_wk)
    epilogue = (sorted_routes_ptr, tile_experts_ptr, num_routes, bias_ptr, stride_be, router_weights_ptr, act_scale_ptr,
                stride_am, stride_ag, alpha, limit)  # fmt: skip
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume, (0, rows_ring, weights_ring, out_smem, out_desc, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M,
                    GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE, BLOCK_M, SPLIT)),
        (_consume, (1, rows_ring, weights_ring, out_smem, out_desc, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M,
                    GATED, INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE, BLOCK_M, SPLIT)),
        (fill_rows, (0, rows_ring, x_ptr, stride_xm, rows_desc, of_rows, sorted_routes_ptr, num_padded_ptr, num_routes,
                     K, NUM_N, GROUP_M, TOP_K, BLOCK_M, SPLIT, PROXY_FENCE)),
        (fill_rows, (1, rows_ring, x_ptr, stride_xm, rows_desc, of_rows, sorted_routes_ptr, num_padded_ptr, num_routes,
                     K, NUM_N, GROUP_M, TOP_K, BLOCK_M, SPLIT, PROXY_FENCE)),
        (fill_weights, (0, weights_ring, weights_desc, of_weights, tile_experts_ptr, num_padded_ptr, progress_ptr, N, K,
                        NUM_N, GROUP_M, GATED, HALVES, BLOCK_M, SPLIT)),
        (fill_weights, (1, weights_ring, weights_desc, of_weights, tile_experts_ptr, num_padded_ptr, progress_ptr, N, K,
                        NUM_N, GROUP_M, GATED, HALVES, BLOCK_M, SPLIT)),
    ], [4, 1, 1, 1, 1], [REGISTERS[0], REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]])  # fmt: skip
