"""The up and the down GEMM of the experts for Hopper (sm_90): persistent, warp-specialised, two consumers in turns.

One kernel serves both GEMMs; the rows are those of `kernels.grouped_gemm`, every expert padded to BLOCK_M = 64. Four
roles share a program of 12 warps and a ring of STAGES stages, each with one K step of the rows and of the weights:

    _gather   2 warps  cp.async  x ---------+                    +--> _consume 0   4 warps  wgmma, epilogue, TMA store
                                            +--> ring of stages -+
    _load     1 warp   TMA  weights, act ---+                    +--> _consume 1   4 warps  wgmma, epilogue, TMA store

    consumer 0   | tile 0: K steps | tile 0: epilogue | tile 2: K steps | tile 2: epilogue | ...
    consumer 1   | wait for turn   | tile 1: K steps  | tile 1: epilogue| tile 3: K steps  | ...

The tiles of a program are numbered by `step`, and the K steps of all of them, one after the other, by `index`: step t
owns the indices from t * K_STEPS on. Index i lives in stage i % STAGES, in that stage's pass i // STAGES. A barrier's
phases complete in order, and a wait for phase p sees its parity, p & 1, only: it is right while phase p - 1 is over.

    barrier    arrivals in a phase             who arrives                          who waits, for which phase
    full[s]    1                               _load, which announces its bytes     the consumer of index i,
               + 1 a thread of _gather         cp.async: the thread's rows are here for pass i // STAGES
               (and all announced bytes)       TMA: these bytes are here
    empty[s]   1                               the consumer of index i, when the    _load and _gather before index i,
                                               wgmma that read it are over          for pass i // STAGES - 1
    turn[c]    1                               consumer 1 - c, when all wgmma       consumer c before its tile of step
                                               of its tile are issued               t, for phase t // 2 - 1 + c

A wait for phase -1 returns at once: so the first fill of a stage and the first turn of consumer 0 begin. The turns keep
the waits for `full` in the order of the indices. Without them a consumer would wait for a pass that is two ahead, take
the completed phase before it for the one it wants, and read a stage that is not its own.

Tails. K: TMA fills with zeros past the last column of weights and act, the gather past the last column of x; it takes
both sides, since 0 * NaN is NaN. N: accumulator columns past the last one come from zeros (gate columns: from rows of
the up half), and the TMA store clips them. Rows: padding rows come from zeros and are not stored.

Operands are of 16 bits, or quantised to fp8: then the epilogue multiplies by the scales of the rows and of the weights,
which the sums over K have in common. The tensor cores keep fewer than 24 bits of an fp8 sum; the error of that, 0.2 to
0.4 %, is small beside the 2 % of rounding to fp8. Scales and biases come a tile ahead (`kernels.ahead`).
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

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.ahead import affine, load_ahead
from moe_ops.kernels.compat import block_barrier, cp_async, tma_load
from moe_ops.kernels.epilogue import halves, quantize, rounded, store_box
from moe_ops.kernels.persistent import PATIENCE, expert_of, first_column, load_step, routes_of, tile, used_rows

# More warps than 12 would cap a thread at 128 registers when the program starts, too few for wgmma of 256 columns.
_GATHER_WARPS = gl.constexpr(2)
# Registers of the threads of consumer 1, _gather and _load; consumer 0 gets what is left (232).
_CONSUMER_REGISTERS = gl.constexpr(216)
_PRODUCER_REGISTERS = gl.constexpr(56)
# K steps before the end of a stretch at which it counts as loaded: the ring has work while the news gets round.
_EARLY_STEPS = gl.constexpr(4)


@gluon.jit
def _load_box(weights_desc, bar, box, expert, n, k, N_MAJOR: gl.constexpr):
    if N_MAJOR:
        tma_load(weights_desc, [expert, k, n], bar, box)
    else:
        tma_load(weights_desc, [expert, n, k], bar, box)


@gluon.jit
def _load(ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, N: gl.constexpr,
          K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr,
          N_MAJOR: gl.constexpr):  # fmt: skip
    """The TMA warp: weights, and the rows of act where there is a descriptor of them."""
    rows_smem, weights_smem, full, empty = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    BLOCK_M: gl.constexpr = rows_smem.shape[1]
    BLOCK_K: gl.constexpr = rows_smem.shape[2]
    COLUMN_DIM: gl.constexpr = 2 if N_MAJOR else 1
    COLUMNS: gl.constexpr = weights_smem.shape[1 + COLUMN_DIM]
    LOADED_ROWS: gl.constexpr = 0 if rows_desc is None else BLOCK_M
    K_STEPS: gl.constexpr = triton.cdiv(K, BLOCK_K)
    # The next tile's expert is fetched while the ring is full, and so costs no time.
    PREFETCH_AT: gl.constexpr = 3 if K_STEPS > 4 else 0
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    index = 0
    step = 0
    patience = gl.to_tensor(PATIENCE)
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    expert = expert_of(tile_experts_ptr, block_m, num_m)
    while number < num_m * NUM_N:
        next_number, next_block_m, next_block_n = tile(step + 1, num_m, NUM_N, GROUP_M)
        next_expert = expert
        column = first_column(block_n, N, BLOCK_N)
        # The last tiles are not for all programs.
        patience = gl.where((step + 1) * gl.num_programs(0) <= num_m * NUM_N, patience, 0)
        for k_step in range(K_STEPS):
            stage = index % STAGES
            k = k_step * BLOCK_K
            patience = load_step(progress_ptr, index, patience, 1, _EARLY_STEPS)
            mbarrier.wait(empty.index(stage), ((index // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, (LOADED_ROWS + COLUMNS) * BLOCK_K * (weights_desc.dtype.primitive_bitwidth // 8))
            if rows_desc is not None:
                tma_load(rows_desc, [block_m * BLOCK_M, k], bar, rows_smem.index(stage))
            box = weights_smem.index(stage)
            if HALVES:
                HALF: gl.constexpr = COLUMNS // 2
                _load_box(weights_desc, bar, box.slice(0, HALF, dim=COLUMN_DIM), expert, column, k, N_MAJOR)
                _load_box(weights_desc, bar, box.slice(HALF, HALF, dim=COLUMN_DIM), expert, N + column, k, N_MAJOR)
            else:
                _load_box(weights_desc, bar, box, expert, column * (COLUMNS // BLOCK_N), k, N_MAJOR)
            index += 1
            if k_step == PREFETCH_AT:
                next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
        number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
        step += 1


@gluon.jit
def _gather(ring, x_ptr, stride_xm, sorted_routes_ptr, num_padded_ptr, num_routes, K: gl.constexpr,
            NUM_N: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr):  # fmt: skip
    """The cp.async warps: rows of x by route; without x they have nothing to do.

    Padding rows are zeroed and not read: a dummy row read by all programs would be a hot spot in L2.
    """
    if x_ptr is not None:
        rows_smem, weights_smem, full, empty = ring
        STAGES: gl.constexpr = rows_smem.shape[0]
        BLOCK_M: gl.constexpr = rows_smem.shape[1]
        BLOCK_K: gl.constexpr = rows_smem.shape[2]
        # 16 bytes a thread.
        UNIT: gl.constexpr = 128 // rows_smem.dtype.primitive_bitwidth
        # Rows start at multiples of 16 bytes, in a form from which the compiler sees it.
        row_step = stride_xm // 16 * 16 if UNIT == 16 else stride_xm // 8 * 8
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, UNIT], [4, 8], [gl.num_warps(), 1], [1, 0])
        k_offsets = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
        offsets_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        num_m = gl.load(num_padded_ptr) // BLOCK_M
        index = 0
        step = 0
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
        while number < num_m * NUM_N:
            routes = gl.load(sorted_routes_ptr + block_m * BLOCK_M + offsets_m)
            tokens = (routes // TOP_K).to(gl.int64)
            x_ptrs = x_ptr + tokens[:, None] * row_step + k_offsets[None, :]
            row_mask = (routes < num_routes)[:, None]
            for k_step in range(triton.cdiv(K, BLOCK_K)):
                stage = index % STAGES
                k = k_step * BLOCK_K
                mask = row_mask
                if K % BLOCK_K != 0:
                    mask = row_mask & (k + k_offsets < K)[None, :]
                mbarrier.wait(empty.index(stage), ((index // STAGES) & 1) ^ 1)
                cp_async(rows_smem.index(stage), x_ptrs + k, mask=mask)
                # Each thread arrives when its copies are complete; without the increment, `full` counts it in advance.
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                index += 1
            step += 1
            number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
        async_copy.wait_group(0)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, ring, turn, out_smem, out_desc, columns_smem, sources, epilogue, tile_experts_ptr,
             num_padded_ptr, N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr,
             TOP_K: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, N_MAJOR: gl.constexpr,
             ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, DTYPE: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """Every second tile of the program, from step CONSUMER on: the K steps in turn, then the epilogue out of turn."""
    rows_smem, weights_smem, full, empty = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    BLOCK_M: gl.constexpr = rows_smem.shape[1]
    BLOCK_K: gl.constexpr = rows_smem.shape[2]
    COLUMNS: gl.constexpr = weights_smem.shape[3 if N_MAJOR else 2]
    BLOCK_N: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    K_STEPS: gl.constexpr = triton.cdiv(K, BLOCK_K)
    # One instruction takes 32 bytes of K.
    STEP: gl.constexpr = 256 // rows_smem.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, STEP])
    columns = (None if columns_smem[0] is None else columns_smem[0].index(CONSUMER),
               None if columns_smem[1] is None else columns_smem[1].index(CONSUMER))  # fmt: skip
    sorted_routes_ptr, num_routes = epilogue[1:3]
    BUFFERS: gl.constexpr = out_smem.shape[0] // 2
    buffers = (out_smem.index(CONSUMER * BUFFERS), out_smem.index(CONSUMER * BUFFERS + BUFFERS - 1))
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    step = CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    n = first_column(block_n, N, BLOCK_N)
    expert = expert_of(tile_experts_ptr, block_m, num_m)
    routes = routes_of(sorted_routes_ptr, block_m * BLOCK_M, num_m * BLOCK_M, BLOCK_M)
    scales, channels, biases, out_scale = load_ahead(
        sources, expert, block_m, num_m, n, BLOCK_M, N, COLUMNS, GATED, INTERLEAVED, TOP_K, LAYOUT,
    )  # fmt: skip
    next_number, next_block_m, next_block_n = tile(step + 2, num_m, NUM_N, GROUP_M)
    next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
    while number < num_m * NUM_N:
        first = step * K_STEPS
        if columns[0] is not None:
            columns[0].store(channels)
        if columns[1] is not None:
            columns[1].store(biases)
        used = used_rows(routes, num_routes)
        routes = routes_of(sorted_routes_ptr, next_block_m * BLOCK_M, num_m * BLOCK_M, BLOCK_M)
        next_n = first_column(next_block_n, N, BLOCK_N)
        next_scales, channels, biases, next_out_scale = load_ahead(
            sources, next_expert, next_block_m, num_m, next_n, BLOCK_M, N, COLUMNS, GATED, INTERLEAVED, TOP_K, LAYOUT,
        )  # fmt: skip
        mbarrier.wait(turn.index(CONSUMER), (1 - CONSUMER) ^ ((step // 2) & 1))
        acc = gl.zeros((BLOCK_M, COLUMNS), gl.float32, LAYOUT)
        for k_step in range(K_STEPS):
            index = first + k_step
            stage = index % STAGES
            mbarrier.wait(full.index(stage), (index // STAGES) & 1)
            if FENCE:
                # cp.async writes through the generic proxy and wgmma reads through the async proxy. The copies complete
                # behind the back of the gathering threads, so the fence stands here, with the step before it in flight.
                fence_async_shared()
            if N_MAJOR:
                weights = weights_smem.index(stage).reshape((BLOCK_K, COLUMNS))
            else:
                weights = weights_smem.index(stage).reshape((COLUMNS, BLOCK_K)).permute((1, 0))
            pending = warpgroup_mma(rows_smem.index(stage), weights, acc, use_acc=k_step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(pending,))
            if k_step > 0:
                mbarrier.arrive(empty.index((index + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(turn.index(1 - CONSUMER), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((first + K_STEPS + STAGES - 1) % STAGES), count=1)
        if sources[0] is not None:
            acc *= scales[:, None]
        _store_tile(acc, buffers, BUFFERS, out_desc, columns, out_scale, epilogue, block_m, used, n, GATED,
                    INTERLEAVED, ACTIVATION, HAS_LIMIT, DTYPE)  # fmt: skip
        step += 2
        number, block_m, n = next_number, next_block_m, next_n
        scales, out_scale = next_scales, next_out_scale
        next_number, next_block_m, next_block_n = tile(step + 2, num_m, NUM_N, GROUP_M)
        next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
    tma.store_wait(0)


@gluon.jit
def _store_tile(acc, buffers, BUFFERS: gl.constexpr, out_desc, columns, out_scale, epilogue, block_m, used, n,
                GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr,
                DTYPE: gl.constexpr):  # fmt: skip
    """Routing weight, bias and activation of a tile in registers, then its columns n and following, box by box."""
    router_weights_ptr, sorted_routes_ptr, num_routes, alpha, limit = epilogue
    BLOCK_M: gl.constexpr = out_desc.block_shape[1]
    BOX: gl.constexpr = out_desc.block_shape[2]
    BOXES: gl.constexpr = acc.shape[1] // (2 * BOX if GATED else BOX)
    row = block_m * BLOCK_M
    if router_weights_ptr is not None:
        routes = gl.load(sorted_routes_ptr + row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, acc.type.layout)))
        weights = gl.load(router_weights_ptr + routes, mask=routes < num_routes, other=0.0)
        acc *= weights.to(gl.float32)[:, None]
    sides = halves(acc)
    quarters = halves(sides[0]) + halves(sides[1])
    for box in gl.static_range(BOXES):
        column = n + box * BOX
        if not GATED:
            y = affine(quarters[box], columns, box * BOX)
            if ACTIVATION is not None:
                y = nonlinearity(y, ACTIVATION, alpha, PTX=True)
        else:
            if INTERLEAVED:
                pairs = affine(sides[box], columns, 2 * box * BOX)
                gate, up = pairs.reshape((BLOCK_M, BOX, 2)).split()
            else:
                gate = affine(quarters[box], columns, box * BOX)
                up = affine(quarters[box + 2], columns, (box + 2) * BOX)
            y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit, PTX=True)
        if out_desc.dtype.primitive_bitwidth == 8:
            y = quantize(rounded(y, DTYPE), out_scale)
        store_box(y, buffers[box % 2], out_desc, row, used, column, PENDING=BUFFERS - 1)


@gluon.jit(do_not_specialize=[
    "num_routes", "stride_xm", "stride_sm", "stride_se", "stride_we", "stride_oe", "stride_be", "alpha", "limit",
])  # fmt: skip
def pingpong_kernel(
    x_ptr, rows_desc, weights_desc, row_scale_ptr, weight_scale_ptr, channel_scale_ptr, out_scale_ptr, bias_ptr,
    router_weights_ptr, out_desc, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, progress_ptr, num_routes,
    stride_xm, stride_sm, stride_se, stride_we, stride_oe, stride_be, alpha, limit,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, N_MAJOR: gl.constexpr, DTYPE: gl.constexpr,
    PROXY_FENCE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[p, :N] = act(rows[p, :K] @ w[e]^T (* scales) (* router weight) + bias[e]) for the sorted rows p.

    Scales of quantised operands: of a row, of token t or sorted row p, or of an expert (row_scale_ptr); of an expert's
    weights (weight_scale_ptr) or of each of their rows (channel_scale_ptr). With out_scale_ptr the results, rounded to
    DTYPE, are divided by a scale per expert and stored in fp8. A stride is 0 where a scale is shared.

    The rows are gathered from x (up GEMM), or come by `rows_desc` (down GEMM; x_ptr None). A tile makes BLOCK_N columns
    of out, from twice as many rows of w where GATED. N and K are constexpr: a model has one of each, and the order of
    the tiles and the masks of the tails fold away. The boxes of the descriptors are those of `backends.pingpong`.
    """
    COLUMNS: gl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    GATHER: gl.constexpr = x_ptr is not None
    ROWS_DTYPE: gl.constexpr = x_ptr.dtype.element_ty if GATHER else rows_desc.dtype
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, ROWS_DTYPE.primitive_bitwidth, 2)
    WEIGHTS_BOX: gl.constexpr = [1, BLOCK_K, COLUMNS] if N_MAJOR else [1, COLUMNS, BLOCK_K]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows_smem = gl.allocate_shared_memory(ROWS_DTYPE, [STAGES, BLOCK_M, BLOCK_K], ROWS_LAYOUT)
    weights_smem = gl.allocate_shared_memory(weights_desc.dtype, [STAGES] + WEIGHTS_BOX, weights_desc.layout)
    # There is room for a second box of each consumer where it is of 8 bits, or there is a stage less.
    BUFFERS: gl.constexpr = 2 if STAGES < 5 or out_desc.dtype.primitive_bitwidth == 8 else 1
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2 * BUFFERS] + out_desc.block_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * _GATHER_WARPS if GATHER else 1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    block_barrier()
    ring = (rows_smem, weights_smem, full, empty)
    columns_smem = (
        None if channel_scale_ptr is None else gl.allocate_shared_memory(gl.float32, [2, COLUMNS], LINE),
        None if bias_ptr is None else gl.allocate_shared_memory(gl.float32, [2, COLUMNS], LINE),
    )  # fmt: skip
    sources = (row_scale_ptr, stride_sm, stride_se, weight_scale_ptr, channel_scale_ptr, stride_we, bias_ptr, stride_be,
               out_scale_ptr, stride_oe, sorted_routes_ptr, num_routes)  # fmt: skip
    epilogue = (router_weights_ptr, sorted_routes_ptr, num_routes, alpha, limit)
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume, (0, ring, turn, out_smem, out_desc, columns_smem, sources, epilogue, tile_experts_ptr,
                    num_padded_ptr, N, K, NUM_N, GROUP_M, TOP_K if GATHER else 0, GATED, INTERLEAVED, N_MAJOR,
                    ACTIVATION, HAS_LIMIT, DTYPE, PROXY_FENCE and GATHER)),
        (_consume, (1, ring, turn, out_smem, out_desc, columns_smem, sources, epilogue, tile_experts_ptr,
                    num_padded_ptr, N, K, NUM_N, GROUP_M, TOP_K if GATHER else 0, GATED, INTERLEAVED, N_MAJOR,
                    ACTIVATION, HAS_LIMIT, DTYPE, PROXY_FENCE and GATHER)),
        (_gather, (ring, x_ptr, stride_xm, sorted_routes_ptr, num_padded_ptr, num_routes, K, NUM_N, GROUP_M, TOP_K)),
        (_load, (ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, N, K, NUM_N, GROUP_M,
                 BLOCK_N, HALVES, N_MAJOR)),
    ], [4, _GATHER_WARPS, 1], [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS, _PRODUCER_REGISTERS])  # fmt: skip
