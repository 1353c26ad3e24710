"""Those who fill the rings of the block-scaled kernel; its head (`kernels.blockscaled`) has the protocol.

A ring is (stages in shared memory, the scales of each, its barriers `full`, its barriers `empty`), those of both
consumers one after the other. Whoever fills or reads one keeps its place, (stage, parity of the phase to wait for), and
goes round by `next_place`.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe_ops.kernels.compat import block_barrier, cp_async, tma_load
from moe_ops.kernels.persistent import CONSUMER_ROWS, PATIENCE, expert_of, load_step, tile

# Elements of a group of a row, of either side of a block of weights, and columns of a partial sum.
GROUP = gl.constexpr(128)
# Scales of a half of a tile's weights in a K step: the second is of what a block cuts off.
HALF_SCALES = gl.constexpr(2)
# K steps before the end of a stretch at which it counts as loaded; the rings hold fewer than that of ping-pong.
_EARLY_STEPS = gl.constexpr(2)


@gluon.jit
def next_place(stage, phase, STAGES: gl.constexpr):
    """The next place of a ring."""
    following = stage + 1
    again = following == STAGES
    return gl.where(again, 0, following), gl.where(again, phase ^ 1, phase)


@gluon.jit
def fill_weights(CONSUMER: gl.constexpr, ring, weights_desc, scales, tile_experts_ptr, num_padded_ptr, progress_ptr,
             N: gl.constexpr, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, GATED: gl.constexpr,
             HALVES: gl.constexpr, BLOCK_M: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """The TMA warp of a ring of weights: both halves of every K step of the consumer's tiles, and their scales."""
    if CONSUMER == 0 or not SPLIT:
        weights_smem, weight_scales, full, empty = ring
        STAGES: gl.constexpr = weights_smem.shape[0] // 2
        FIRST: gl.constexpr = CONSUMER * STAGES
        # Halves of a stage, and stages of a K step.
        BOXES: gl.constexpr = 2 if SPLIT else 1
        STRIDE: gl.constexpr = 1 if SPLIT else 2
        K_STEPS: gl.constexpr = triton.cdiv(K, GROUP)
        WEIGHT_ROWS: gl.constexpr = 2 * N if GATED else N
        weight_scale_ptr, stride_we, stride_wn, stride_wk = scales
        # The first row of a half, and the first one of its next block of weights.
        offsets_cut = gl.arange(0, HALF_SCALES, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])) * cut(N, HALVES)
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
            next_number, next_block_m, next_block_n = tile(step + STRIDE, num_m, NUM_N, GROUP_M)
            next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)
            # The last tiles are not for all programs, and of a program's two rings.
            patience = gl.where((step + STRIDE) * gl.num_programs(0) <= num_m * NUM_N, patience, 0)
            rows0 = weight_row(block_n, 0, N, HALVES) + offsets_cut
            rows1 = weight_row(block_n, 1, N, HALVES) + offsets_cut
            # Weights that do not exist are zeros, and so are their scales.
            exist0 = rows0 < WEIGHT_ROWS
            exist1 = rows1 < WEIGHT_ROWS
            expert_scale_ptr = weight_scale_ptr + expert.to(gl.int64) * stride_we
            ptrs0 = expert_scale_ptr + (rows0 // GROUP).to(gl.int64) * stride_wn
            ptrs1 = expert_scale_ptr + (rows1 // GROUP).to(gl.int64) * stride_wn
            # Scales are asked for two K steps ahead: a load takes one or more.
            scales0 = gl.load(ptrs0, mask=exist0, other=0.0)
            scales1 = gl.load(ptrs1, mask=exist1, other=0.0)
            next0 = gl.load(ptrs0 + stride_wk, mask=exist0 & (K_STEPS > 1), other=0.0)
            next1 = gl.load(ptrs1 + stride_wk, mask=exist1 & (K_STEPS > 1), other=0.0)
            for k_step in range(K_STEPS):
                patience = load_step(progress_ptr, index, patience, STRIDE, _EARLY_STEPS)
                index += 1
                for half in gl.static_range(2):
                    bar = full.index(FIRST + stage)
                    if half % BOXES == 0:
                        mbarrier.wait(empty.index(FIRST + stage), phase)
                    row = weight_row(block_n, half, N, HALVES)
                    box = (FIRST + stage) * BOXES + half % BOXES
                    tma_load(weights_desc, [expert, row, k_step * GROUP], bar, weights_smem.index(box))
                    weight_scales.index(box).store((scales1 if half else scales0).to(gl.float32))
                    if half % BOXES == BOXES - 1:
                        # Bytes may be there before they are announced; what this warp stored must be.
                        block_barrier()
                        mbarrier.expect(bar, BOXES * GROUP * GROUP)
                        stage, phase = next_place(stage, phase, STAGES)
                scales0 = next0
                scales1 = next1
                ptrs0 += stride_wk
                ptrs1 += stride_wk
                later = k_step + 2 < K_STEPS
                next0 = gl.load(ptrs0 + stride_wk, mask=exist0 & later, other=0.0)
                next1 = gl.load(ptrs1 + stride_wk, mask=exist1 & later, other=0.0)
            number, block_m, block_n, expert = next_number, next_block_m, next_block_n, next_expert
            step += STRIDE


@gluon.jit
def weight_row(block_n, half: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr):
    """The first row of weights of a half of a tile."""
    return half * N + block_n * GROUP if HALVES else (2 * block_n + half) * GROUP


@gluon.constexpr_function
def cut(N, HALVES):
    """Columns of a tile's second half after which its next block of weights begins: that of up need not begin one."""
    return GROUP.value - N % GROUP.value if HALVES else GROUP.value


@gluon.jit
def fill_rows(CONSUMER: gl.constexpr, ring, x_ptr, stride_xm, rows_desc, scales, sorted_routes_ptr, num_padded_ptr,
          num_routes, K: gl.constexpr, NUM_N: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr,
          BLOCK_M: gl.constexpr, SPLIT: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """The warp of a ring of rows: rows of x by route (padding rows zeroed and not read), or by descriptor; and scales.

    The copies of cp.async complete behind the warp's back: it says so when those of the next stage are on their way; by
    then, in a full ring, they are long complete. FENCE: they were written through the generic proxy, and wgmma reads
    through the async proxy.
    """
    rows_smem, row_scales, full, empty = ring
    STAGES: gl.constexpr = rows_smem.shape[0] // 2
    FIRST: gl.constexpr = CONSUMER * STAGES
    BARRIER: gl.constexpr = 0 if SPLIT else FIRST
    STRIDE: gl.constexpr = 1 if SPLIT else 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [gl.num_warps(), 1], [1, 0])
    row_scale_ptr, stride_sm, stride_sg = scales
    # Of the scales: a thread's own rows.
    offsets_own = gl.arange(0, CONSUMER_ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
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
        own = row + offsets_own
        exist = own >= 0
        if x_ptr is not None:
            own = gl.load(sorted_routes_ptr + own)
            exist = own < num_routes
            own = own // TOP_K
        scale_ptrs = row_scale_ptr + own.to(gl.int64) * stride_sm
        for k_step in range(triton.cdiv(K, GROUP)):
            k = k_step * GROUP
            mbarrier.wait(empty.index(BARRIER + stage), phase)
            if x_ptr is not None:
                mask = row_mask
                if K % GROUP != 0:
                    mask = row_mask & (k + k_offsets < K)[None, :]
                cp_async(rows_smem.index(FIRST + stage), x_ptrs + k, mask=mask)
            else:
                # Its bytes may be there before they are announced.
                tma_load(rows_desc, [row, k], full.index(BARRIER + stage), rows_smem.index(FIRST + stage))
            cp_async(row_scales.index(FIRST + stage), scale_ptrs, mask=exist)
            scale_ptrs += stride_sg
            async_copy.commit_group()
            async_copy.wait_group(1)
            _filled(full.index(BARRIER + copied), copying, x_ptr is not None, FENCE)
            copied = stage
            copying = num_m > 0
            stage, phase = next_place(stage, phase, STAGES)
        step += STRIDE
        number, block_m, block_n = tile(step, num_m, NUM_N, GROUP_M)
    async_copy.wait_group(0)
    _filled(full.index(BARRIER + copied), copying, x_ptr is not None, FENCE)


@gluon.jit
def _filled(bar, pred, COPIED: gl.constexpr, FENCE: gl.constexpr):
    """Says that this warp's copies into a stage are there, and where the rows are not COPIED by it, announces them."""
    if COPIED and FENCE:
        fence_async_shared()
    block_barrier()
    if COPIED:
        mbarrier.arrive(bar, count=1, pred=pred)
    else:
        mbarrier.expect(bar, CONSUMER_ROWS * GROUP, pred=pred)
