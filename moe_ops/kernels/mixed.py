"""The up and the down GEMM of experts of int8 weights beside 16-bit rows, many rows each, on Hopper (sm_90).

Rows come sorted and in planes (`kernels.planes.gather_planes_kernel`): columns of one remainder by PLANES side by side.
Weights go from shared memory into registers, become pairs of bfloat16 or float16 there (`kernels.pairs`), and are the
tall operand of wgmma, which takes them from there; the rows are the other one. So what is computed is out^T: a tile has
BLOCK_M rows and two halves of 64 rows of weights, gate and up or neighbours.

Four roles share a program of 12 warps, two of which are idle; each consumer has tiles and a ring of stages of its own:

    _fill c      1 warp each    TMA  weights, rows ---> ring of c ---> _consume c   4 warps each
                                                                       numbers, wgmma, epilogue, TMA store

A consumer makes the numbers of a plane while wgmma multiply the one before it, and waits for both at the end of a K
step; what is exposed of that lies beside the other consumer's wgmma. A stage is all of a K step.

    barrier     arrivals in a phase    who arrives                       who waits, before what
    full[s]     1 and the bytes        _fill c, which announces them     _consume c, a K step before its wgmma
    empty[s]    1                      _consume c, when the wgmma that   _fill c, before it fills s again
                                       read it are over

A filler begins with parity 1, that of the phase before the first.

Tails. K: TMA fills both sides with zeros past the last column, of each plane. N: rows of weights past the last one are
zeros (past the gate's too), the TMA store clips their columns. Rows: padding rows are zeros and are stored.
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
from moe_ops.kernels.compat import block_barrier, reinterpret, tma_load, tma_store
from moe_ops.kernels.epilogue import rounded, store_box
from moe_ops.kernels.packed_operand import plane_numbers
from moe_ops.kernels.pairs import pair_offset
from moe_ops.kernels.persistent import PATIENCE, load_step, tile
from moe_ops.kernels.rings import next_place

# Weights in one stored element.
PLANES = gl.constexpr(2)
# Rows of weights of a tile.
ROWS = gl.constexpr(128)
# Registers of the threads of consumer 1 and of the fillers; consumer 0 gets what is left.
_CONSUMER_REGISTERS = gl.constexpr(232)
_FILLER_REGISTERS = gl.constexpr(40)
# K steps before the end of a stretch at which it counts as loaded.
_EARLY_STEPS = gl.constexpr(2)


@gluon.jit
def _fill(CONSUMER: gl.constexpr, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr,
          max_rows, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """The TMA warp of a consumer's ring."""
    rows_smem, weights_smem, full, empty = ring
    STAGES: gl.constexpr = full.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    BLOCK_M: gl.constexpr = rows_smem.shape[1]
    STEP: gl.constexpr = rows_smem.shape[2]
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
        next_number, next_block_m, next_block_n = tile(step + 2, num_m, NUM_N, GROUP_M)
        next_expert = gl.load(tile_experts_ptr + gl.maximum(gl.minimum(next_block_m, num_m - 1), 0))
        # The last tiles are not for all programs, and of a program's two rings.
        patience = gl.where((step + 2) * gl.num_programs(0) <= num_m * NUM_N, patience, 0)
        for k_step in range(triton.cdiv(K, PLANES * STEP)):
            patience = load_step(progress_ptr, index, patience, 2, _EARLY_STEPS)
            index += 1
            place = FIRST + stage
            mbarrier.wait(empty.index(place), phase)
            bar = full.index(place)
            mbarrier.expect(bar, 2 * STEP * (ROWS + PLANES * BLOCK_M))
            row = block_n * (ROWS // 2 if GATED else ROWS)
            tma_load(weights_desc, [expert, 0, row, k_step * STEP], bar, weights_smem.index(place))
            for plane in gl.static_range(PLANES):
                row = plane * max_rows + block_m * BLOCK_M
                tma_load(rows_desc, [row, k_step * STEP], bar, rows_smem.index(PLANES * place + plane))
            stage, phase = next_place(stage, phase, STAGES)
        number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
        step += 2


@gluon.jit
def _consume(CONSUMER: gl.constexpr, ring, out_smem, out_desc, epilogue, num_padded_ptr, N: gl.constexpr,
             K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, ACTIVATION: gl.constexpr,
             GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr,
             DTYPE: gl.constexpr):  # fmt: skip
    """Every second tile of the program, from step CONSUMER on."""
    rows_smem, weights_smem, full, empty = ring
    STAGES: gl.constexpr = full.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    BLOCK_M: gl.constexpr = rows_smem.shape[1]
    STEP: gl.constexpr = rows_smem.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    K_STEPS: gl.constexpr = triton.cdiv(K, PLANES * STEP)
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    # What the numbers have too much, negative; it is added where the dtype's have something.
    offset = gl.full((ROWS, STEP), -pair_offset(FORMAT, DTYPE), DTYPE, OPERAND)
    stage = 0
    phase = 0
    step = CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    while number < num_m * NUM_N:
        acc = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
        mbarrier.wait(full.index(FIRST + stage), phase)
        q = weights_smem.index(FIRST + stage).reshape((ROWS, STEP)).load(OPERAND)
        w = plane_numbers(q, offset, 0, FORMAT, DTYPE)
        for k_step in range(K_STEPS):
            place = FIRST + stage
            acc = warpgroup_mma(w, rows_smem.index(PLANES * place).permute((1, 0)), acc, is_async=True)
            w = plane_numbers(q, offset, 1, FORMAT, DTYPE)
            acc = warpgroup_mma(w, rows_smem.index(PLANES * place + 1).permute((1, 0)), acc, is_async=True)
            # The next step's first numbers are made meanwhile; past the last step this one's are, once more. wgmma with
            # numbers in registers that go on from one turn of a loop to the next are made to wait for each other.
            stage, phase = next_place(stage, phase, STAGES)
            more = k_step + 1 < K_STEPS
            mbarrier.wait(full.index(FIRST + stage), phase, pred=more)
            following = gl.where(more, FIRST + stage, place)
            q = weights_smem.index(following).reshape((ROWS, STEP)).load(OPERAND)
            w = plane_numbers(q, offset, 0, FORMAT, DTYPE)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(place), count=1)
        _store_tile(acc, CONSUMER, out_smem, out_desc, epilogue, block_m, block_n, N, ACTIVATION, GATED,
                    INTERLEAVED, HAS_LIMIT, DTYPE)  # fmt: skip
        step += 2
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    tma.store_wait(0)


@gluon.jit
def _affine(acc, epilogue, expert, column, half: gl.constexpr, row, N: gl.constexpr, GATED: gl.constexpr,
            INTERLEAVED: gl.constexpr):  # fmt: skip
    """A half's sums times the scales of its rows of weights (* router weight), with the bias. [ROWS / 2, BLOCK_M]"""
    (scale_ptr, stride_se, stride_sn, bias_ptr, stride_be, router_weights_ptr, sorted_routes_ptr, tile_experts_ptr,
     num_routes, max_rows, alpha, limit) = epilogue  # fmt: skip
    columns = column + gl.arange(0, ROWS // 2, gl.SliceLayout(1, acc.type.layout))
    exist = columns < N
    weight_rows = columns
    if GATED:
        weight_rows = 2 * columns + half if INTERLEAVED else half * N + columns
    expert = expert.to(gl.int64)
    scale_ptrs = scale_ptr + expert * stride_se + weight_rows.to(gl.int64) * stride_sn
    acc *= gl.load(scale_ptrs, mask=exist, other=0.0).to(gl.float32)[:, None]
    if router_weights_ptr is not None:
        routes = gl.load(sorted_routes_ptr + row + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout)))
        weights = gl.load(router_weights_ptr + routes, mask=routes < num_routes, other=0.0).to(gl.float32)
        acc *= weights[None, :]
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * stride_be + weight_rows
        acc += gl.load(bias_ptrs, mask=exist, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _store_tile(acc, CONSUMER: gl.constexpr, out_smem, out_desc, epilogue, block_m, block_n, N: gl.constexpr,
                ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr,
                DTYPE: gl.constexpr):  # fmt: skip
    """Scales, bias and activation of a tile in registers, then its columns, in planes where there is an activation."""
    max_rows, alpha, limit = epilogue[9:]
    row = block_m * acc.shape[1]
    acc0, acc1 = acc.reshape((2, ROWS // 2, acc.shape[1])).permute((1, 2, 0)).split()
    expert = gl.load(epilogue[7] + block_m)
    if GATED:
        gate = _affine(acc0, epilogue, expert, block_n * (ROWS // 2), 0, row, N, True, INTERLEAVED)
        up = _affine(acc1, epilogue, expert, block_n * (ROWS // 2), 1, row, N, True, INTERLEAVED)
        y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit, PTX=True)
        _store_planes(rounded(y, DTYPE), CONSUMER, out_smem, out_desc, row, block_n * (ROWS // 2), max_rows)
    else:
        for half in gl.static_range(2):
            column = (2 * block_n + half) * (ROWS // 2)
            y = _affine(acc1 if half else acc0, epilogue, expert, column, half, row, N, False, False)
            if ACTIVATION is not None:
                y = rounded(nonlinearity(y, ACTIVATION, alpha, PTX=True), DTYPE)
                _store_planes(y, CONSUMER, out_smem, out_desc, row, column, max_rows)
            else:
                store_box(rounded(y, DTYPE).permute((1, 0)), out_smem.index(CONSUMER), out_desc, row, column)


@gluon.jit
def _store_planes(y, CONSUMER: gl.constexpr, out_smem, out_desc, row, column, max_rows):
    """Stores columns [ROWS / 2, BLOCK_M] of rows in planes."""
    BLOCK_M: gl.constexpr = y.shape[1]
    WIDTH: gl.constexpr = ROWS // 2 // PLANES
    boxes = reinterpret(out_smem, out_smem.dtype, [2, PLANES, BLOCK_M, WIDTH], gl.NVMMASharedLayout(2 * WIDTH, 16, 3))
    tma.store_wait(0)
    block_barrier()
    boxes.index(CONSUMER).store(y.reshape((WIDTH, PLANES, BLOCK_M)).permute((1, 2, 0)))
    fence_async_shared()
    block_barrier()
    for plane in gl.static_range(PLANES):
        tma_store(out_desc, [plane * max_rows + row, column // PLANES], out_smem.index(PLANES * CONSUMER + plane))


@gluon.jit(do_not_specialize=["num_routes", "max_rows", "stride_se", "stride_sn", "stride_be", "alpha", "limit"])
def mixed_kernel(
    rows_desc, weights_desc, scale_ptr, bias_ptr, router_weights_ptr, out_desc, sorted_routes_ptr, tile_experts_ptr,
    num_padded_ptr, progress_ptr, num_routes, max_rows, stride_se, stride_sn, stride_be, alpha, limit,
    N: gl.constexpr, K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[p, :N] = act(rows[p, :K] @ w[e]^T * scale[e] (* router weight) + bias[e]) for the sorted rows p.

    The rows are in planes, and so is the result of the up GEMM (ACTIVATION not None): plane i from row i * max_rows on.
    A scale belongs to a row of w. A tile makes BLOCK_N columns of out from 128 rows of w. STAGES: of a consumer's ring.
    The boxes of the descriptors are those of `backends.mixed`.
    """
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    DTYPE: gl.constexpr = rows_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    OUT_BOXES: gl.constexpr = 1 if ACTIVATION is None else PLANES
    rows_smem = gl.allocate_shared_memory(DTYPE, [2 * STAGES * PLANES] + rows_desc.block_shape, rows_desc.layout)
    weights_smem = gl.allocate_shared_memory(
        weights_desc.dtype, [2 * STAGES] + weights_desc.block_shape, weights_desc.layout
    )
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2 * OUT_BOXES] + out_desc.block_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    block_barrier()
    ring = (rows_smem, weights_smem, full, empty)
    epilogue = (scale_ptr, stride_se, stride_sn, bias_ptr, stride_be, router_weights_ptr, sorted_routes_ptr,
                tile_experts_ptr, num_routes, max_rows, alpha, limit)  # fmt: skip
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume, (0, ring, out_smem, out_desc, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M, ACTIVATION, GATED,
                    INTERLEAVED, HAS_LIMIT, FORMAT, DTYPE)),
        (_consume, (1, ring, out_smem, out_desc, epilogue, num_padded_ptr, N, K, NUM_N, GROUP_M, ACTIVATION, GATED,
                    INTERLEAVED, HAS_LIMIT, FORMAT, DTYPE)),
        (_fill, (0, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, max_rows, K, NUM_N,
                 GROUP_M, GATED)),
        (_fill, (1, ring, rows_desc, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr, max_rows, K, NUM_N,
                 GROUP_M, GATED)),
    ], [4, 1, 1], [_CONSUMER_REGISTERS, _FILLER_REGISTERS, _FILLER_REGISTERS])  # fmt: skip
