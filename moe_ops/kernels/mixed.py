"""The up and the down GEMM of experts of 8- or 4-bit weights beside 16-bit rows, many rows each, on Hopper (sm_90).

Rows come sorted, their columns in the order in which they are multiplied (`kernels.planes.scatter_planes_kernel`).
Weights go from shared memory into registers, become pairs of bfloat16 or float16 there (`kernels.mixed_operand`), and
are the tall operand of wgmma, which takes them from there; the rows are the other one. So what is computed is out^T: a
tile has BLOCK_M rows and two halves of 64 rows of weights, gate and up or neighbours.

Four roles share a program of 12 warps, two of which are idle; each consumer has tiles and a ring of stages of its own:

    _fill c      1 warp each    TMA  weights, rows ---> ring of c ---> _consume c   4 warps each
                                                                       numbers, wgmma, epilogue, TMA store

A consumer makes the numbers of a plane while wgmma multiply the one before it, and waits for both at the end of a K
step; what is exposed of that lies beside the other consumer's wgmma. A stage is all of a K step. Of a row block whose
second half is padding the first is multiplied alone.

    barrier     arrivals in a phase    who arrives                       who waits, before what
    full[s]     1 and the bytes        _fill c, which announces them     _consume c, a K step before its wgmma
    empty[s]    1                      _consume c, when the wgmma that   _fill c, before it fills s again
                                       read it are over

A filler begins with parity 1, that of the phase before the first.

Scales of rows multiply the sums. Those of groups of columns multiply the numbers; they are asked for a part ahead.

Tails. K: both sides have zeros past the last column. N: rows of weights past the last one are zeros (past the gate's
too), the columns of act that they would be are stored as zeros, those of the result clipped by the TMA store. Rows:
padding rows are whatever they are; what becomes of them is not stored, or with zero points is read by nobody.
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

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import block_barrier, tma_load
from moe_ops.kernels.epilogue import rounded, store_box
from moe_ops.kernels.mixed_operand import (
    COLUMNS,
    ROWS,
    codes,
    factors,
    group_layout,
    group_side,
    groups_of,
    numbers,
    operand_layout,
    part_words,
    planes_of,
    weight_rows,
)
from moe_ops.kernels.packed_operand import offsets
from moe_ops.kernels.persistent import PATIENCE, existing, expert_of, load_step, routes_of, tile, used_rows
from moe_ops.kernels.rings import next_place

# Registers of the threads of consumer 1 and of the fillers; consumer 0 gets what is left.
_CONSUMER_REGISTERS = gl.constexpr(232)
_FILLER_REGISTERS = gl.constexpr(40)
# K steps before the end of a stretch at which it counts as loaded.
_EARLY_STEPS = gl.constexpr(2)


@gluon.jit
def _fill(CONSUMER: gl.constexpr, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr,
          K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """The TMA warp of a consumer's ring."""
    rows_smem, weights_smem, full, empty = ring
    STAGES: gl.constexpr = full.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    BLOCK_M: gl.constexpr = rows_smem.shape[1]
    WIDTH: gl.constexpr = weights_smem.shape[4]
    PARTS: gl.constexpr = rows_smem.shape[0] // weights_smem.shape[0]
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    stage = 0
    phase = 1
    index = 0
    step = CONSUMER
    patience = gl.to_tensor(PATIENCE)
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    expert = expert_of(tile_experts_ptr, block_m, num_m)
    while number < num_m * NUM_N:
        # The next tile's expert is fetched while the ring is full, and so costs no time.
        next_number, next_block_m, next_block_n = tile(step + 2, num_m, NUM_N, GROUP_M)
        next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
        # The last tiles are not for all programs, and of a program's two rings.
        patience = gl.where((step + 2) * gl.num_programs(0) <= num_m * NUM_N, patience, 0)
        for k_step in range(triton.cdiv(K, PARTS * COLUMNS)):
            patience = load_step(progress_ptr, index, patience, 2, _EARLY_STEPS)
            index += 1
            place = FIRST + stage
            mbarrier.wait(empty.index(place), phase)
            bar = full.index(place)
            mbarrier.expect(bar, 2 * (WIDTH * ROWS + PARTS * COLUMNS * BLOCK_M))
            row = block_n * (ROWS // 2 if GATED else ROWS)
            tma_load(weights_desc, [expert, 0, row, k_step * WIDTH], bar, weights_smem.index(place))
            for part in gl.static_range(PARTS):
                column = (k_step * PARTS + part) * COLUMNS
                tma_load(rows_desc, [block_m * BLOCK_M, column], bar, rows_smem.index(PARTS * place + part))
            stage, phase = next_place(stage, phase, STAGES)
        number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
        step += 2


@gluon.jit
def _consume(CONSUMER: gl.constexpr, ring, out_smem, out_desc, side, epilogue, num_padded_ptr, N: gl.constexpr,
             K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, ACTIVATION: gl.constexpr,
             GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr,
             SCALE_COLUMNS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Every second tile of the program, from step CONSUMER on."""
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    stage = 0
    phase = 0
    step = CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    sorted_routes_ptr, tile_experts_ptr, num_routes = epilogue[3:6]
    expert = expert_of(tile_experts_ptr, block_m, num_m)
    # With zero points there are no registers to count with.
    COUNTED: gl.constexpr = side[4] is None
    routes = _routes(sorted_routes_ptr, block_m, num_m, BLOCK_M, COUNTED)
    while number < num_m * NUM_N:
        # The next tile's are fetched during this one, and so cost no time.
        step += 2
        next_number, next_block_m, next_block_n = tile(step, num_m, NUM_N, GROUP_M)
        next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
        if COUNTED:
            used = used_rows(routes, num_routes)
            few = used <= BLOCK_M // 2
        else:
            used = None
            few = routes >= num_routes
        routes = _routes(sorted_routes_ptr, next_block_m, num_m, BLOCK_M, COUNTED)
        if BLOCK_M > 64 and few:
            # What both branches begin with would be merged before them, and the loops' pairs of numbers come apart.
            block_barrier()
            stage, phase = _tile(CONSUMER, BLOCK_M // 2, ring, out_smem, out_desc, side, epilogue, stage, phase, expert,
                                 used, block_m, block_n, N, K, ACTIVATION, GATED, INTERLEAVED, HAS_LIMIT, FORMAT,
                                 SCALE_COLUMNS, DTYPE)  # fmt: skip
        else:
            stage, phase = _tile(CONSUMER, BLOCK_M, ring, out_smem, out_desc, side, epilogue, stage, phase, expert,
                                 used, block_m, block_n, N, K, ACTIVATION, GATED, INTERLEAVED, HAS_LIMIT, FORMAT,
                                 SCALE_COLUMNS, DTYPE)  # fmt: skip
        number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
    tma.store_wait(0)


@gluon.jit
def _routes(sorted_routes_ptr, block_m, num_m, BLOCK_M: gl.constexpr, ALL: gl.constexpr):
    """Routes of a row block, or the first one of its second half."""
    if ALL:
        return routes_of(sorted_routes_ptr, block_m * BLOCK_M, num_m * BLOCK_M, BLOCK_M)
    else:
        return gl.load(sorted_routes_ptr + existing(block_m, num_m) * BLOCK_M + BLOCK_M // 2)


@gluon.jit
def _tile(CONSUMER: gl.constexpr, USED: gl.constexpr, ring, out_smem, out_desc, side, epilogue, stage, phase, expert,
          used, block_m, block_n, N: gl.constexpr, K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
          INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr,
          DTYPE: gl.constexpr):  # fmt: skip
    """The first USED rows of a tile; where the ring is after it."""
    rows_smem, weights_smem, full, empty = ring
    scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, _, _, stride_zk = side
    STAGES: gl.constexpr = full.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    PARTS: gl.constexpr = rows_smem.shape[0] // weights_smem.shape[0]
    K_STEPS: gl.constexpr = triton.cdiv(K, PARTS * COLUMNS)
    PLANES: gl.constexpr = planes_of(FORMAT)
    WIDTH: gl.constexpr = COLUMNS // PLANES
    GROUPS: gl.constexpr = groups_of(SCALE_COLUMNS)
    HAS_ZERO: gl.constexpr = zero_ptr is not None
    STORED: gl.constexpr = scale_ptr.dtype.element_ty
    OPERAND: gl.constexpr = operand_layout(USED)
    LAYOUT: gl.constexpr = OPERAND.parent
    GROUP: gl.constexpr = group_layout(WIDTH, GROUPS)
    SIZE: gl.constexpr = GROUP.shape[2]
    # Scales of rows are on their way during the products.
    rows, exist = weight_rows(block_n, N, GATED, INTERLEAVED, gl.SliceLayout(1, LAYOUT))
    row_scales = 0
    factor = (0, 0)
    scale_words = 0
    zero_words = 0
    scale_ptrs = 0
    zero_ptrs = 0
    there = 0
    odd = 0
    if GROUPS == 0:
        scale_ptrs = scale_ptr + expert.to(gl.int64) * stride_se + rows.to(gl.int64) * stride_sn
        row_scales = gl.load(scale_ptrs, mask=exist, other=0.0)
    else:
        scale_ptrs, zero_ptrs, odd, there = group_side(side, expert, block_n, N, GATED, INTERLEAVED, FORMAT, GROUP)
        scale_words = part_words(scale_ptrs, stride_sk, there, 0, K, SCALE_COLUMNS, GROUP)
        factor = factors(scale_words, STORED, FORMAT, DTYPE, SIZE)
        scale_words = part_words(scale_ptrs, stride_sk, there, COLUMNS, K, SCALE_COLUMNS, GROUP)
        if HAS_ZERO:
            zero_words = part_words(zero_ptrs, stride_zk, there, 0, K, SCALE_COLUMNS, GROUP)
    offset = offsets(zero_words, odd, HAS_ZERO, FORMAT, DTYPE, GROUP)
    if HAS_ZERO:
        zero_words = part_words(zero_ptrs, stride_zk, there, COLUMNS, K, SCALE_COLUMNS, GROUP)
    acc = gl.zeros((ROWS, USED), gl.float32, LAYOUT)
    mbarrier.wait(full.index(FIRST + stage), phase)
    q = codes(weights_smem, FIRST + stage, 0, WIDTH, OPERAND)
    w = numbers(q, offset, factor, 0, GROUPS > 0, STORED, FORMAT, DTYPE, OPERAND)
    for k_step in range(K_STEPS):
        place = FIRST + stage
        stage, phase = next_place(stage, phase, STAGES)
        for part in gl.static_range(PARTS):
            for plane in gl.static_range(PLANES):
                x = rows_smem.index(PARTS * place + part).slice(0, USED).slice(plane * WIDTH, WIDTH, dim=1)
                acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
                if plane + 1 == PLANES:
                    # The next part's first numbers are made meanwhile; past the last step this one's are, once more.
                    source = place
                    if part + 1 == PARTS:
                        more = k_step + 1 < K_STEPS
                        mbarrier.wait(full.index(FIRST + stage), phase, pred=more)
                        source = gl.where(more, FIRST + stage, place)
                    q = codes(weights_smem, source, (part + 1) % PARTS, WIDTH, OPERAND)
                    column = (k_step * PARTS + part + 2) * COLUMNS
                    if GROUPS:
                        factor = factors(scale_words, STORED, FORMAT, DTYPE, SIZE)
                        scale_words = part_words(scale_ptrs, stride_sk, there, column, K, SCALE_COLUMNS, GROUP)
                    if HAS_ZERO:
                        offset = offsets(zero_words, odd, HAS_ZERO, FORMAT, DTYPE, GROUP)
                        zero_words = part_words(zero_ptrs, stride_zk, there, column, K, SCALE_COLUMNS, GROUP)
                # The registers of the numbers before are free then.
                acc = warpgroup_mma_wait(1, deps=(acc,))
                w = numbers(q, offset, factor, (plane + 1) % PLANES, GROUPS > 0, STORED, FORMAT, DTYPE, OPERAND)
        # wgmma with numbers in registers that go on from one turn of a loop to the next would wait for each other.
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(place), count=1)
    if GROUPS == 0:
        acc *= row_scales.to(gl.float32)[:, None]
    _store_tile(acc, rows, exist, CONSUMER, out_smem, out_desc, epilogue, expert, block_m * rows_smem.shape[1], used,
                block_n, N, ACTIVATION, GATED, HAS_LIMIT, PLANES, DTYPE)  # fmt: skip
    return stage, phase


@gluon.jit
def _store_tile(acc, weight_rows, exist, CONSUMER: gl.constexpr, out_smem, out_desc, epilogue, expert, row, used,
                block_n, N: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, HAS_LIMIT: gl.constexpr,
                PLANES: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Router weights, bias and activation of a tile in registers, then its columns, those of act in planes."""
    bias_ptr, stride_be, router_weights_ptr, sorted_routes_ptr, _, num_routes, alpha, limit = epilogue
    if router_weights_ptr is not None:
        routes = gl.load(sorted_routes_ptr + row + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout)))
        weights = gl.load(router_weights_ptr + routes, mask=routes < num_routes, other=0.0).to(gl.float32)
        acc *= weights[None, :]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + expert.to(gl.int64) * stride_be + weight_rows, mask=exist, other=0.0)
        acc += bias.to(gl.float32)[:, None]
    if ACTIVATION is not None and N % COLUMNS:
        # Zero weights times infinity are no zeros. Of zeros all activations are.
        acc = gl.where(exist[:, None], acc, 0.0)
    ORDER: gl.constexpr = PLANES if ACTIVATION is not None else 1
    acc0, acc1 = acc.reshape((2, ROWS // 2, acc.shape[1])).permute((1, 2, 0)).split()
    if GATED:
        y = activate_gated(acc0, acc1, ACTIVATION, HAS_LIMIT, alpha, limit, PTX=True)
        _store_half(y, CONSUMER, out_smem, out_desc, row, used, block_n * COLUMNS, ORDER, DTYPE)
    else:
        for half in gl.static_range(2):
            y = acc1 if half else acc0
            if ACTIVATION is not None:
                y = nonlinearity(y, ACTIVATION, alpha, PTX=True)
            _store_half(y, CONSUMER, out_smem, out_desc, row, used, (2 * block_n + half) * COLUMNS, ORDER, DTYPE)


@gluon.jit
def _store_half(y, CONSUMER: gl.constexpr, out_smem, out_desc, row, used, column, PLANES: gl.constexpr,
                DTYPE: gl.constexpr):  # fmt: skip
    """Stores columns [COLUMNS, rows] of rows, in planes if PLANES > 1."""
    USED: gl.constexpr = y.shape[1]
    y = rounded(y, DTYPE)
    if PLANES > 1:
        y = y.reshape((COLUMNS // PLANES, PLANES, USED)).permute((1, 0, 2)).reshape((COLUMNS, USED))
    store_box(y.permute((1, 0)), out_smem.index(CONSUMER), out_desc, row, used, column)


_RUNTIME = ["num_routes", "stride_se", "stride_sn", "stride_sk", "stride_ze", "stride_zn", "stride_zk", "stride_be"]


@gluon.jit(do_not_specialize=[*_RUNTIME, "alpha", "limit"])
def mixed_kernel(
    rows_desc, weights_desc, scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk,
    bias_ptr, router_weights_ptr, out_desc, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, progress_ptr,
    num_routes, stride_be, alpha, limit,
    N: gl.constexpr, K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[p, :N] = act(rows[p, :K] @ w[e]^T (* router weight) + bias[e]) for the sorted rows p.

    The columns of the rows are in planes, and so are those of the result of the up GEMM (ACTIVATION not None), which
    ends with zeros. A scale belongs to a row of w, or to SCALE_COLUMNS columns of one. A tile makes BLOCK_N columns of
    out from 128 rows of w. STAGES: of a consumer's ring. The boxes of the descriptors are those of `backends.mixed`.
    """
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    DTYPE: gl.constexpr = rows_desc.dtype
    PARTS: gl.constexpr = BLOCK_K // COLUMNS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    rows_smem = gl.allocate_shared_memory(DTYPE, [2 * STAGES * PARTS] + rows_desc.block_shape, rows_desc.layout)
    weights_smem = gl.allocate_shared_memory(
        weights_desc.dtype, [2 * STAGES] + weights_desc.block_shape, weights_desc.layout
    )
    BOXES: gl.constexpr = [BLOCK_M // out_desc.block_shape[1]] + out_desc.block_shape[1:]
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2] + BOXES, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    block_barrier()
    ring = (rows_smem, weights_smem, full, empty)
    side = (scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk)
    epilogue = (bias_ptr, stride_be, router_weights_ptr, sorted_routes_ptr, tile_experts_ptr, num_routes, alpha, limit)
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume, (0, ring, out_smem, out_desc, side, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M, ACTIVATION,
                    GATED, INTERLEAVED, HAS_LIMIT, FORMAT, SCALE_COLUMNS, DTYPE)),
        (_consume, (1, ring, out_smem, out_desc, side, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M, ACTIVATION,
                    GATED, INTERLEAVED, HAS_LIMIT, FORMAT, SCALE_COLUMNS, DTYPE)),
        (_fill, (0, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, K, NUM_N, GROUP_M,
                 GATED)),
        (_fill, (1, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, K, NUM_N, GROUP_M,
                 GATED)),
    ], [4, 1, 1], [_CONSUMER_REGISTERS, _FILLER_REGISTERS, _FILLER_REGISTERS])  # fmt: skip
