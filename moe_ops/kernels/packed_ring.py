"""The ring of the kernels for packed weights and who fills it; their head (`kernels.packed`) has the roles.

A ring is (weights in shared memory, rows there, barriers `full`, barriers `empty`), with the same stages.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe_ops.kernels.compat import block_barrier, cp_async, gdc_launch_dependents, gdc_wait, reinterpret, tma_load
from moe_ops.kernels.grouped_gemm import tile
from moe_ops.kernels.rings import next_place

PLANES = gl.constexpr(4)
# Elements of 16 bits of a step and of a block, in which the order of a row in planes is; columns of a step.
STEP = gl.constexpr(64)
BLOCK = gl.constexpr(32)
BLOCK_K = gl.constexpr(256)
# Of the rows of a stage: two planes of a block each, 128 bytes of a row.
TILES = gl.constexpr(4)
# Rows of weights that a warp multiplies at once.
PIECE = gl.constexpr(16)
# Of the tiles of a stage as they are copied, [TILES, rows, 2 * BLOCK], 16 bytes a thread: all by two addresses of 8
# rows, and what is added to them.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, 1, 1], [2, 1, 0]))


@gluon.constexpr_function
def plane_width(columns: int) -> int:
    """As `layout.plane_stride`, before the kernel is compiled."""
    return triton.cdiv(columns // PLANES.value, BLOCK.value) * BLOCK.value


@gluon.constexpr_function
def filler_registers(block_m: int) -> int:
    """Registers of those who fill the stages: a thread has addresses of block_m / 4 rows."""
    return 24 if block_m == 8 else 32 + block_m // 2


@gluon.jit
def start(weights_desc, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """A program's rings: (weights, rows, barriers `full`, barriers `empty`), with the same stages."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _begin(full, empty, STAGES)
    w_smem = gl.allocate_shared_memory(weights_desc.dtype, [STAGES] + weights_desc.block_shape, weights_desc.layout)
    x_smem = gl.allocate_shared_memory(
        DTYPE, [STAGES * TILES, BLOCK_M, 2 * BLOCK], gl.NVMMASharedLayout(4 * BLOCK, 16, 2)
    )
    fence_async_shared()
    block_barrier()
    return w_smem, x_smem, full, empty


@gluon.jit
def _begin(full, empty, STAGES: gl.constexpr):
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=1)


@gluon.jit
def begin_again(rings):
    """Makes rings that are no longer used those of another tile."""
    w_smem, x_smem, full, empty = rings
    STAGES: gl.constexpr = w_smem.shape[0]
    block_barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
        mbarrier.invalidate(empty.index(i))
    _begin(full, empty, STAGES)
    fence_async_shared()
    block_barrier()


@gluon.jit
def tile_of(index, max_tiles, tile_experts_ptr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, SPLITS: gl.constexpr):
    """(row block, column block, part of K, expert) of a tile; -1 for the expert of a row block that there is not."""
    block_m, block_n = tile(index // SPLITS, max_tiles, NUM_N, GROUP_M)
    # Past the L1, which may still have a line of the call before this one.
    expert = gl.load(tile_experts_ptr + block_m, cache_modifier=".cg")
    return block_m, block_n, index % SPLITS, expert


@gluon.jit
def rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """The sorted rows of a block, their routes, and which of them are no padding. [BLOCK_M]"""
    rows = block_m * BLOCK_M + gl.arange(0, BLOCK_M, LAYOUT)
    routes = gl.load(sorted_routes_ptr + rows, cache_modifier=".cg")
    return rows, routes, routes < num_routes


@gluon.jit
def steps_of(split, STEPS: gl.constexpr, SPLITS: gl.constexpr):
    """(first, last) step of a part: whole steps; the last part may have fewer, or none."""
    PART: gl.constexpr = triton.cdiv(STEPS, SPLITS)
    return gl.minimum(split * PART, STEPS), gl.minimum(split * PART + PART, STEPS)


@gluon.jit
def fill_weights(rings, tile, weights_desc, ROWS: gl.constexpr, STEPS: gl.constexpr, SPLITS: gl.constexpr,
                 GATED: gl.constexpr):  # fmt: skip
    """The warp that asks for the weights, by TMA."""
    w_smem, x_smem, full, empty = rings
    block_m, block_n, split, expert = tile
    STAGES: gl.constexpr = w_smem.shape[0]
    if expert >= 0:
        first, last = steps_of(split, STEPS, SPLITS)
        stage = 0
        phase = 1
        for step in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, ROWS * STEP * 2)
            box = w_smem.index(stage)
            if GATED:
                tma_load(weights_desc, [expert, block_n * (ROWS // PIECE), 0, 0, step * STEP], bar, box)
            else:
                tma_load(weights_desc, [expert, block_n * ROWS, step * STEP], bar, box)
            stage, phase = next_place(stage, phase, STAGES)


@gluon.jit
def fill_rows(rings, tile, row_ptr, stride_rm, sorted_routes_ptr, num_routes, K: gl.constexpr, TOP_K: gl.constexpr,
              BLOCK_M: gl.constexpr, SPLITS: gl.constexpr, WAIT: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """The warp that copies the rows, a stage at once; padding rows are zeros, and are not read.

    TOP_K: routes of a token, whose rows these are; 0: sorted rows. WAIT: for the launch before this one, which makes
    them. The copies complete behind the warp's back: it says so when those of the next stage are on their way.
    """
    w_smem, x_smem, full, empty = rings
    block_m, block_n, split, expert = tile
    STAGES: gl.constexpr = w_smem.shape[0]
    WIDTH: gl.constexpr = plane_width(K)
    LINES: gl.constexpr = gl.SliceLayout(0, ROWS_LAYOUT)
    rows, routes, mask = rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M, gl.SliceLayout(1, LINES))
    if WAIT:
        gdc_wait()
        gdc_launch_dependents()
    if expert >= 0:
        first, last = steps_of(split, triton.cdiv(K, BLOCK_K), SPLITS)
        if TOP_K:
            rows = routes // TOP_K
        columns = gl.arange(0, 2 * BLOCK, gl.SliceLayout(0, LINES))
        # Rows start at multiples of a block of 32, in a form from which the compiler sees it.
        lines = row_ptr + rows.to(gl.int64)[:, None] * (stride_rm // 32 * 32)
        lines += (columns // BLOCK * WIDTH + columns % BLOCK)[None, :]
        tiles = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, ROWS_LAYOUT)))
        block = tiles // 2 * BLOCK
        ptrs = lines[None, :, :] + (block + tiles % 2 * 2 * WIDTH)[:, None][:, :, None]
        boxes = reinterpret(
            x_smem, x_smem.dtype, [STAGES, TILES, BLOCK_M, 2 * BLOCK], gl.NVMMASharedLayout(4 * BLOCK, 16, 3)
        )
        alive = mask[:, None][None, :, :]
        stage = 0
        phase = 1
        # The stage whose copies are on their way, if there is one.
        copied = STAGES - 1
        for step in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            there = alive
            if WIDTH % STEP != 0:
                there = alive & (step * STEP + block < WIDTH)[:, None][:, :, None]
            cp_async(boxes.index(stage), ptrs + step * STEP, mask=there)
            async_copy.commit_group()
            async_copy.wait_group(1)
            if FENCE:
                fence_async_shared()
            mbarrier.arrive(full.index(copied), count=1, pred=step > first)
            copied = stage
            stage, phase = next_place(stage, phase, STAGES)
        async_copy.wait_group(0)
        if FENCE:
            fence_async_shared()
        mbarrier.arrive(full.index(copied), count=1, pred=last > first)
