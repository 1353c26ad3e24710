"""The ring of the kernels for packed weights and who fills it; their head (`kernels.packed`) has the roles.

A ring is (weights in shared memory, rows there, barriers `full`, barriers `empty`), with the same stages.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe_ops.kernels.compat import block_barrier, cp_async, gdc_launch_dependents, gdc_wait, tma_load
from moe_ops.kernels.grouped_gemm import tile
from moe_ops.kernels.rings import next_place

PLANES = gl.constexpr(4)
# Elements of 16 bits of a step and of a block, in which the order of a row in planes is; columns of a step.
STEP = gl.constexpr(64)
BLOCK = gl.constexpr(32)
BLOCK_K = gl.constexpr(256)
# Rows of weights that a warp multiplies at once.
PIECE = gl.constexpr(16)
# Of a block of rows as it is copied, 16 bytes a thread.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0]))


@gluon.constexpr_function
def plane_width(columns: int) -> int:
    """As `layout.plane_stride`, before the kernel is compiled."""
    return triton.cdiv(columns // PLANES.value, BLOCK.value) * BLOCK.value


@gluon.constexpr_function
def filler_registers(block_m: int) -> int:
    """Registers of those who fill the stages: one copies block_m / 8 rows at a time."""
    return 8 + block_m


@gluon.jit
def start(weights_desc, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """A program's rings: (weights, rows, barriers `full`, barriers `empty`), with the same stages."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=1)
    w_smem = gl.allocate_shared_memory(weights_desc.dtype, [STAGES] + weights_desc.block_shape, weights_desc.layout)
    x_smem = gl.allocate_shared_memory(
        DTYPE, [STAGES * PLANES * (STEP // BLOCK), BLOCK_M, BLOCK], gl.NVMMASharedLayout(2 * BLOCK, 16, 2)
    )
    fence_async_shared()
    block_barrier()
    return w_smem, x_smem, full, empty


@gluon.jit
def tile_of(tile_experts_ptr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, SPLITS: gl.constexpr):
    """(row block, column block, part of K, expert) of this program."""
    num_m = gl.num_programs(0) // SPLITS // NUM_N
    block_m, block_n = tile(gl.program_id(0) // SPLITS, num_m, NUM_N, GROUP_M)
    # Past the L1, which may still have a line of the call before this one.
    expert = gl.load(tile_experts_ptr + block_m, cache_modifier=".cg")
    return block_m, block_n, gl.program_id(0) % SPLITS, expert


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
    """The warp that copies the rows, plane by plane and block by block; padding rows are zeros, and are not read.

    TOP_K: routes of a token, whose rows these are; 0: sorted rows. WAIT: for the launch before this one, which makes
    them. The copies complete behind the warp's back: it says so when those of the next stage are on their way.
    """
    w_smem, x_smem, full, empty = rings
    block_m, block_n, split, expert = tile
    STAGES: gl.constexpr = w_smem.shape[0]
    WIDTH: gl.constexpr = plane_width(K)
    if WAIT:
        gdc_wait()
        gdc_launch_dependents()
    if expert >= 0:
        first, last = steps_of(split, triton.cdiv(K, BLOCK_K), SPLITS)
        rows, routes, mask = rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M, gl.SliceLayout(1, ROWS_LAYOUT))
        if TOP_K:
            rows = routes // TOP_K
        offsets = gl.arange(0, BLOCK, gl.SliceLayout(0, ROWS_LAYOUT))
        # Rows start at multiples of a block of 32, in a form from which the compiler sees it.
        ptrs = row_ptr + rows.to(gl.int64)[:, None] * (stride_rm // 32 * 32) + offsets[None, :]
        stage = 0
        phase = 1
        # The stage whose copies are on their way, if there is one.
        copied = STAGES - 1
        for step in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            for plane in gl.static_range(PLANES):
                for block in gl.static_range(STEP // BLOCK):
                    there = mask[:, None]
                    if WIDTH % STEP != 0 and block > 0:
                        there = there & (step * STEP + block * BLOCK < WIDTH)
                    x = x_smem.index((stage * PLANES + plane) * (STEP // BLOCK) + block)
                    cp_async(x, ptrs + (step * STEP + plane * WIDTH + block * BLOCK), mask=there)
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
