"""Those who fill the rings of the block-scaled kernel; its head (`kernels.blockscaled`) has the protocol.

A ring is (stages in shared memory, its barriers `full`, its barriers `empty`), those of both consumers one after the
other. Whoever fills or reads one keeps its place, (stage, parity of the phase to wait for), and goes round by
`next_place`.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe_ops.kernels.compat import cp_async, tma_load
from moe_ops.kernels.persistent import PATIENCE, load_step, tile

# Elements of a group of a row, of either side of a block of weights, and columns of a partial sum.
GROUP = gl.constexpr(128)
CONSUMER_ROWS = gl.constexpr(64)
# K steps before the end of a stretch at which it counts as loaded; the rings hold fewer than that of ping-pong.
_EARLY_STEPS = gl.constexpr(2)


@gluon.jit
def next_place(stage, phase, STAGES: gl.constexpr):
    """The next place of a ring."""
    following = stage + 1
    again = following == STAGES
    return gl.where(again, 0, following), gl.where(again, phase ^ 1, phase)


@gluon.jit
def fill_weights(CONSUMER: gl.constexpr, ring, weights_desc, tile_experts_ptr, num_padded_ptr, progress_ptr,
             N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, HALVES: gl.constexpr,
             BLOCK_M: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """The TMA warp of a ring of weights: both halves of every K step of the consumer's tiles."""
    if CONSUMER == 0 or not SPLIT:
        weights_smem, full, empty = ring
        STAGES: gl.constexpr = weights_smem.shape[0] // 2
        FIRST: gl.constexpr = CONSUMER * STAGES
        # Halves of a stage, and stages of a K step.
        BOXES: gl.constexpr = 2 if SPLIT else 1
        STRIDE: gl.constexpr = 1 if SPLIT else 2
        K_STEPS: gl.constexpr = triton.cdiv(K, GROUP)
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
                patience = load_step(progress_ptr, index, patience, STRIDE, _EARLY_STEPS)
                index += 1
                for half in gl.static_range(2):
                    bar = full.index(FIRST + stage)
                    if half % BOXES == 0:
                        mbarrier.wait(empty.index(FIRST + stage), phase)
                        mbarrier.expect(bar, BOXES * GROUP * GROUP)
                    row = weight_row(block_n, half, N, HALVES)
                    box = weights_smem.index((FIRST + stage) * BOXES + half % BOXES)
                    tma_load(weights_desc, [expert, row, k_step * GROUP], bar, box)
                    if half % BOXES == BOXES - 1:
                        stage, phase = next_place(stage, phase, STAGES)
            number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
            step += STRIDE


@gluon.jit
def weight_row(block_n, half: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr):
    """The first row of weights of a half of a tile."""
    return half * N + block_n * GROUP if HALVES else (2 * block_n + half) * GROUP


@gluon.jit
def fill_rows(CONSUMER: gl.constexpr, ring, x_ptr, stride_xm, rows_desc, sorted_routes_ptr, num_padded_ptr, num_routes,
          K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr,
          SPLIT: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """The warp of a ring of rows: rows of x by route (padding rows zeroed and not read), or by descriptor.

    The copies of cp.async complete behind the warp's back: it says so when those of the next stage are on their way; by
    then, in a full ring, they are long complete. FENCE: they were written through the generic proxy, and wgmma reads
    through the async proxy.
    """
    rows_smem, full, empty = ring
    STAGES: gl.constexpr = rows_smem.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    BARRIER: gl.constexpr = 0 if SPLIT else FIRST
    STRIDE: gl.constexpr = 1 if SPLIT else 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [gl.num_warps(), 1], [1, 0])
    k_offsets = gl.arange(0, GROUP, gl.SliceLayout(0, LAYOUT))
    offsets_m = gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))
    num_m = gl.load(num_padded_ptr) // BLOCK_M
    stage = 0
    phase = 1
    # The stage whose copies are on their way, if there is one.
    copied = STAGES - 1
    copying = num_m < 0
    step = 0 if SPLIT else CONSUMER
    number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    while number < num_m * NUM_N:
        row = block_m * BLOCK_M + (CONSUMER * CONSUMER_ROWS if SPLIT else 0)
        if x_ptr is not None:
            routes = gl.load(sorted_routes_ptr + row + offsets_m)
            tokens = (routes // TOP_K).to(gl.int64)
            # Rows start at multiples of 16 bytes, in a form from which the compiler sees it.
            x_ptrs = x_ptr + tokens[:, None] * (stride_xm // 16 * 16) + k_offsets[None, :]
            row_mask = (routes < num_routes)[:, None]
        for k_step in range(triton.cdiv(K, GROUP)):
            k = k_step * GROUP
            mbarrier.wait(empty.index(BARRIER + stage), phase)
            if x_ptr is not None:
                mask = row_mask
                if K % GROUP != 0:
                    mask = row_mask & (k + k_offsets < K)[None, :]
                cp_async(rows_smem.index(FIRST + stage), x_ptrs + k, mask=mask)
                async_copy.commit_group()
                async_copy.wait_group(1)
                if FENCE:
                    fence_async_shared()
                mbarrier.arrive(full.index(BARRIER + copied), count=1, pred=copying)
                copied = stage
                copying = num_m > 0
            else:
                bar = full.index(BARRIER + stage)
                mbarrier.expect(bar, CONSUMER_ROWS * GROUP)
                tma_load(rows_desc, [row, k], bar, rows_smem.index(FIRST + stage))
            stage, phase = next_place(stage, phase, STAGES)
        step += STRIDE
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    if x_ptr is not None:
        async_copy.wait_group(0)
        if FENCE:
            fence_async_shared()
        mbarrier.arrive(full.index(BARRIER + copied), count=1, pred=copying)
