"""The up and the down GEMM of experts of packed 4-bit weights for a few rows each, on Hopper (sm_90).

A tile is one row block of one expert and 64 rows of its weights, in steps along K of 256: 128 bytes of a row of
weights, which TMA brings into a ring of stages with the same columns of the rows, in planes (`kernels.layout`), which
cp.async gathers. Weights go from there into registers, become pairs of bfloat16 or float16 there
(`kernels.packed_operand`), and are the tall operand of wgmma, which takes them from there:

    w    [64, 64] of 16 bits      TMA ---> stage ---> registers --- 4 planes of 2 blocks of 32 ---+
    x    2 planes of a block      cp.async ---------> stage ------------------------------------- + --> wgmma
         side by side, of 2 pairs of planes and 2 blocks: 4 tiles [BLOCK_M, 64]

At the rate of the memory every instruction a weight counts: what a step takes beside making its weights is spread over
128 of them a thread.

A thread's 16 bytes of a row of weights are 32 columns, which never lie in two groups of a scale. Groups of 128 columns
are a block of 32 elements, whose product is scaled; shorter ones scale the weights, in pairs where the dtype holds
scale and product, and those of mxfp4 in bfloat16 by the product that makes numbers of them (`pairs.scaled_e2m1`).

Rows of w1 lie in a stage in pieces of 16, eight of the gate and the eight of up that belong to them: a thread of wgmma
has row r and row r + 8 of a piece, and with them both sides of a column of act.

A program has one tile, or others after it where there are fewer programs than tiles. Three roles share a program of 8
warps, two of which are idle, and one ring of stages, which begins anew with every tile:

    fill_weights    1 warp    waits for `empty`; TMA; announces its bytes at `full`
    fill_rows       1 warp    waits for `empty`; cp.async; arrives at `full` when the copies are there
    _consume_*      4 warps   wait for `full`; multiply; arrive at `empty`; epilogue

`full` has two arrivals and the bytes, `empty` one. Fillers begin with parity 1, that of the phase before the first.

Dependent launch: the down GEMM reads the routing and asks for its first weights before it waits for the up GEMM; of
what came before that it knows that it is over, since the up GEMM waited for it before it let others start.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from moe_ops.kernels.activation import activate_gated, nonlinearity
from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait
from moe_ops.kernels.layout import in_planes
from moe_ops.kernels.packed_operand import BLOCK_LAYOUT, ROWS, offsets, operand, scales, stored, two_planes
from moe_ops.kernels.packed_ring import (
    BLOCK,
    BLOCK_K,
    PIECE,
    PLANES,
    STEP,
    TILES,
    begin_again,
    fill_rows,
    fill_weights,
    filler_registers,
    plane_width,
    rows_of,
    start,
    steps_of,
    tile_of,
)
from moe_ops.kernels.rings import next_place

# Of weights as they are stored, [8, 8, STEP]: of a block, lane t of a row's four has unit t, 16 bytes. Lanes side by
# side have rows r and r + 4, which swizzling keeps in different banks.
_STORED_LAYOUT = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [1, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 32]],
    [[0, 0, 8], [0, 0, 16], [0, 4, 0], [0, 1, 0], [0, 2, 0]], [[2, 0, 0], [4, 0, 0]], [], [8, 8, 64],
))  # fmt: skip


@gluon.jit
def _block_product(q, x_smem, tile, total, FRESH: gl.constexpr, scale, zero, odd, HAS_ZERO: gl.constexpr,
                   FORMAT: gl.constexpr, UNITS: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Starts the products of a block's planes, added to `total` or, if FRESH, by themselves.

    Two planes are made while the two before them are multiplied: the result is there but for the last two, and what was
    started before them is.
    """
    q = gl.convert_layout(q, BLOCK_LAYOUT, assert_trivial=True)
    offset = offsets(zero, odd, HAS_ZERO, FORMAT, DTYPE, BLOCK_LAYOUT)
    if UNITS:
        scale = scale[:, :, None].broadcast_to((ROWS, 4, 8))
    for pair in gl.static_range(PLANES // 2):
        planes = two_planes(q, 2 * pair, offset, scale, FORMAT, UNITS, DTYPE)
        x = x_smem.index(tile + pair).permute((1, 0))
        pending = warpgroup_mma(operand(planes, LAYOUT), x, total, use_acc=not (FRESH and pair == 0),
                                is_async=True)  # fmt: skip
        total = warpgroup_mma_wait(1, deps=(pending,))
    return total


@gluon.jit
def _accumulate(rings, tile, side, acc, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, N: gl.constexpr,
                K: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr, DTYPE: gl.constexpr,
                SPLITS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """The mainloop: acc + weights @ rows^T over the tile's steps, in fp32. [ROWS, BLOCK_M]

    side: scales and zero points, each with their strides.
    """
    w_smem, x_smem, full, empty = rings
    block_m, block_n, split, expert = tile
    scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk = side
    STAGES: gl.constexpr = w_smem.shape[0]
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    UNITS: gl.constexpr = SCALE_COLUMNS < BLOCK * PLANES
    SCALE_DTYPE: gl.constexpr = scale_ptr.dtype.element_ty
    HAS_ZERO: gl.constexpr = zero_ptr is not None
    UNIT_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, BLOCK_LAYOUT))
    SCALE_LAYOUT: gl.constexpr = UNIT_LAYOUT if UNITS else gl.SliceLayout(1, LAYOUT)
    first, last = steps_of(split, triton.cdiv(K, BLOCK_K), SPLITS)
    rows, w_mask = weight_rows(block_n * ROWS, N, ROWS, GATED, INTERLEAVED, SCALE_LAYOUT)
    scale_ptrs = scale_ptr + expert.to(gl.int64) * stride_se + rows.to(gl.int64) * stride_sn
    scale0 = stored(scale_ptrs, stride_sk, w_mask, first, 0, K, SCALE_COLUMNS, UNITS)
    scale1 = stored(scale_ptrs, stride_sk, w_mask, first, 1, K, SCALE_COLUMNS, UNITS)
    zero0 = 0
    zero1 = 0
    odd = 0
    if HAS_ZERO:
        rows, z_mask = weight_rows(block_n * ROWS, N, ROWS, GATED, INTERLEAVED, UNIT_LAYOUT)
        odd = rows % 2
        zero_ptrs = zero_ptr + expert.to(gl.int64) * stride_ze + (rows // 2).to(gl.int64) * stride_zn
        zero0 = stored(zero_ptrs, stride_zk, z_mask, first, 0, K, SCALE_COLUMNS, True)
        zero1 = stored(zero_ptrs, stride_zk, z_mask, first, 1, K, SCALE_COLUMNS, True)
    none = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    stage = 0
    phase = 0
    for step in range(first, last):
        mbarrier.wait(full.index(stage), phase)
        q = w_smem.index(stage).reshape((ROWS // 8, 8, STEP)).load(_STORED_LAYOUT)
        # In the order of wgmma's rows, then block by block; what the compiler calls it moves nothing.
        q = q.reshape((ROWS // 8, 2, 4, 2, 4, 8)).permute((0, 2, 1, 4, 5, 3)).reshape((ROWS, 4, 8, 2))
        q0, q1 = q.split()
        place = stage * TILES
        # What belongs to a block is asked for again when it has been used or, if it is made something else, at once: a
        # step ahead, since nothing else would cover the way to memory of loads this small. What is still to be used
        # would be copied, and so waited for.
        if UNITS:
            factor0 = scales(scale0, FORMAT, DTYPE, SCALE_DTYPE)
            factor1 = scales(scale1, FORMAT, DTYPE, SCALE_DTYPE)
            scale0 = stored(scale_ptrs, stride_sk, w_mask, step + 1, 0, K, SCALE_COLUMNS, UNITS)
            scale1 = stored(scale_ptrs, stride_sk, w_mask, step + 1, 1, K, SCALE_COLUMNS, UNITS)
            total0 = _block_product(q0, x_smem, place, acc, False, factor0, zero0, odd, HAS_ZERO, FORMAT, UNITS, DTYPE,
                                    LAYOUT)  # fmt: skip
        else:
            total0 = _block_product(q0, x_smem, place, none, True, 0, zero0, odd, HAS_ZERO, FORMAT, UNITS, DTYPE,
                                    LAYOUT)  # fmt: skip
        if HAS_ZERO:
            zero0 = stored(zero_ptrs, stride_zk, z_mask, step + 1, 0, K, SCALE_COLUMNS, True)
        if UNITS:
            total1 = _block_product(q1, x_smem, place + TILES // 2, total0, False, factor1, zero1, odd, HAS_ZERO,
                                    FORMAT, UNITS, DTYPE, LAYOUT)  # fmt: skip
        else:
            total1 = _block_product(q1, x_smem, place + TILES // 2, none, True, 0, zero1, odd, HAS_ZERO, FORMAT, UNITS,
                                    DTYPE, LAYOUT)  # fmt: skip
            acc += total0 * scales(scale0, FORMAT, DTYPE, SCALE_DTYPE).to(gl.float32)[:, None]
            scale0 = stored(scale_ptrs, stride_sk, w_mask, step + 1, 0, K, SCALE_COLUMNS, UNITS)
        if HAS_ZERO:
            zero1 = stored(zero_ptrs, stride_zk, z_mask, step + 1, 1, K, SCALE_COLUMNS, True)
        total1 = warpgroup_mma_wait(0, deps=(total1,))
        mbarrier.arrive(empty.index(stage), count=1)
        if UNITS:
            acc = total1
        else:
            acc += total1 * scales(scale1, FORMAT, DTYPE, SCALE_DTYPE).to(gl.float32)[:, None]
            scale1 = stored(scale_ptrs, stride_sk, w_mask, step + 1, 1, K, SCALE_COLUMNS, UNITS)
        stage, phase = next_place(stage, phase, STAGES)
    return acc


@gluon.jit
def weight_rows(first_row, N: gl.constexpr, ROWS: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Which rows of an expert's weight those of wgmma are in a tile, and which of them exist. [ROWS]"""
    row = first_row + gl.arange(0, ROWS, LAYOUT)
    if GATED:
        column = row // PIECE * (PIECE // 2) + _stored_row(row % (PIECE // 2))
        half = row // (PIECE // 2) % 2
        return (2 * column + half if INTERLEAVED else half * N + column), column < N
    else:
        row = row // 8 * 8 + _stored_row(row % 8)
        return row, row < N


@gluon.jit
def _stored_row(row):
    """Which of eight rows that lie together is a row of wgmma's; see `_STORED_LAYOUT`."""
    return row // 2 + row % 2 * 4


@gluon.jit
def _bias(bias_ptr, stride_be, expert, rows, there, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """What the sums begin with: the bias of a tile's rows of weights, in fp32; without one zeros. [ROWS, BLOCK_M]"""
    if bias_ptr is None:
        return gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    else:
        bias = gl.load(bias_ptr + expert.to(gl.int64) * stride_be + rows, mask=there, other=0.0)
        return bias.to(gl.float32)[:, None].broadcast_to((ROWS, BLOCK_M))


@gluon.jit
def _consume_up(rings, tile, side, routing, epilogue, N: gl.constexpr, K: gl.constexpr, ACTIVATION: gl.constexpr,
                GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr,
                SCALE_COLUMNS: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
                ):  # fmt: skip
    """The warps that multiply and store columns of act."""
    block_m, block_n, split, expert = tile
    sorted_routes_ptr, num_routes = routing
    bias_ptr, stride_be, router_weights_ptr, act_ptr, stride_am, alpha, limit = epilogue
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    if expert >= 0:
        w_rows, there = weight_rows(block_n * ROWS, N, ROWS, GATED, INTERLEAVED, gl.SliceLayout(1, LAYOUT))
        bias = _bias(bias_ptr, stride_be, expert, w_rows, there, BLOCK_M, LAYOUT)
        # A router weight multiplies the sums alone.
        acc = bias if router_weights_ptr is None else gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
        acc = _accumulate(rings, tile, side, acc, GATED, INTERLEAVED, N, K, FORMAT, SCALE_COLUMNS, DTYPE, 1, LAYOUT)
        if router_weights_ptr is not None:
            rows, routes, mask = rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M, gl.SliceLayout(0, LAYOUT))
            weights = gl.load(router_weights_ptr + routes, mask=mask, other=0.0).to(gl.float32)
            acc = acc * weights[None, :] + bias
        if GATED:
            gate, up = acc.reshape((ROWS // PIECE, 2, PIECE // 2, BLOCK_M)).permute((0, 2, 3, 1)).split()
            y = activate_gated(gate, up, ACTIVATION, HAS_LIMIT, alpha, limit).reshape((BLOCK_N, BLOCK_M))
        else:
            y = nonlinearity(acc, ACTIVATION, alpha)
        OUT: gl.constexpr = y.type.layout
        columns, exists = weight_rows(block_n * BLOCK_N, N, BLOCK_N, False, False, gl.SliceLayout(1, OUT))
        rows, routes, mask = rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M, gl.SliceLayout(0, OUT))
        act_ptrs = act_ptr + rows.to(gl.int64)[None, :] * stride_am
        gl.store(act_ptrs + in_planes(columns, N, PLANES)[:, None], y.to(act_ptr.dtype.element_ty),
                 mask=mask[None, :] & exists[:, None])  # fmt: skip
        WIDTH: gl.constexpr = plane_width(N)
        if WIDTH * PLANES > N and block_n == triton.cdiv(N, BLOCK_N) - 1:
            # The zeros that a plane ends with.
            behind = N + gl.arange(0, BLOCK * PLANES, gl.SliceLayout(1, OUT))
            zeros = gl.zeros((BLOCK * PLANES, BLOCK_M), DTYPE, OUT)
            gl.store(act_ptrs + in_planes(behind, N, PLANES)[:, None], zeros,
                     mask=mask[None, :] & (behind < WIDTH * PLANES)[:, None])  # fmt: skip


@gluon.jit
def _consume_down(rings, tile, side, routing, epilogue, N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr,
                  SCALE_COLUMNS: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                  SPLITS: gl.constexpr):  # fmt: skip
    """The warps that multiply and store columns of rows."""
    block_m, block_n, split, expert = tile
    sorted_routes_ptr, num_routes = routing
    bias_ptr, stride_be, rows_ptr, stride_rm, max_rows = epilogue
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    if expert >= 0:
        columns, exists = weight_rows(block_n * BLOCK_N, N, BLOCK_N, False, False, gl.SliceLayout(1, LAYOUT))
        # Of one part alone.
        there = columns < gl.where(split == 0, N, 0)
        acc = _bias(bias_ptr, stride_be, expert, columns, there, BLOCK_M, LAYOUT)
        acc = _accumulate(rings, tile, side, acc, False, False, N, K, FORMAT, SCALE_COLUMNS, DTYPE, SPLITS, LAYOUT)
        rows, routes, mask = rows_of(block_m, sorted_routes_ptr, num_routes, BLOCK_M, gl.SliceLayout(0, LAYOUT))
        row_ptrs = rows_ptr + (rows + split * max_rows).to(gl.int64) * stride_rm
        gl.store(row_ptrs[None, :] + columns[:, None], acc.to(rows_ptr.dtype.element_ty),
                 mask=mask[None, :] & exists[:, None])  # fmt: skip


@gluon.jit
def _up_tile(rings, tile, side, routing, epilogue, x_ptr, stride_xm, weights_desc, N: gl.constexpr, K: gl.constexpr,
             TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
             HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    # Constexprs must stand in the tuples at the call: a tuple in a variable would turn them into tensors.
    gl.warp_specialize([
        (_consume_up, (rings, tile, side, routing, epilogue, N, K, ACTIVATION, GATED, INTERLEAVED, HAS_LIMIT, FORMAT,
                       SCALE_COLUMNS, x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)),
        (fill_rows, (rings, tile, x_ptr, stride_xm, routing[0], routing[1], K, TOP_K, BLOCK_M, 1, False, FENCE)),
        (fill_weights, (rings, tile, weights_desc, ROWS, triton.cdiv(K, BLOCK_K), 1, GATED)),
    ], [1, 1], [filler_registers(BLOCK_M), filler_registers(BLOCK_M)])  # fmt: skip


@gluon.jit
def _down_tile(rings, tile, side, routing, epilogue, act_ptr, stride_am, weights_desc, N: gl.constexpr,
               K: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr,
               BLOCK_N: gl.constexpr, SPLITS: gl.constexpr, WAIT: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    gl.warp_specialize([
        (_consume_down, (rings, tile, side, routing, epilogue, N, K, FORMAT, SCALE_COLUMNS, act_ptr.dtype.element_ty,
                         BLOCK_M, BLOCK_N, SPLITS)),
        (fill_rows, (rings, tile, act_ptr, stride_am, routing[0], routing[1], K, 0, BLOCK_M, SPLITS, WAIT, FENCE)),
        (fill_weights, (rings, tile, weights_desc, ROWS, triton.cdiv(K, BLOCK_K), SPLITS, False)),
    ], [1, 1], [filler_registers(BLOCK_M), filler_registers(BLOCK_M)])  # fmt: skip


@gluon.jit(do_not_specialize=["max_tiles", "num_routes", "stride_be", "alpha", "limit"])
def packed_up_kernel(
    x_ptr, weights_desc, bias_ptr, router_weights_ptr, act_ptr,
    sorted_routes_ptr, tile_experts_ptr, max_tiles, num_routes, alpha, limit, stride_xm, stride_be, stride_am,
    scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    ONE_TILE: gl.constexpr, PROXY_FENCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """act[p, :N] = act(x[token of p] @ w1[e]^T (* router weight) + b1[e]) for the sorted rows p; x and act in planes.

    A tile makes BLOCK_N columns of act. The boxes of the descriptor are those of `backends.packed`. Of the tiles of
    max_tiles row blocks, which need not all be there, a program has one, or without ONE_TILE others after it.
    """
    rings = start(weights_desc, x_ptr.dtype.element_ty, BLOCK_M, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    side = (scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk)
    routing = (sorted_routes_ptr, num_routes)
    epilogue = (bias_ptr, stride_be, router_weights_ptr, act_ptr, stride_am, alpha, limit)
    index = gl.program_id(0)
    if ONE_TILE:
        tile = tile_of(index, max_tiles, tile_experts_ptr, NUM_N, GROUP_M, 1)
        _up_tile(rings, tile, side, routing, epilogue, x_ptr, stride_xm, weights_desc, N, K, TOP_K, ACTIVATION, GATED,
                 INTERLEAVED, HAS_LIMIT, FORMAT, SCALE_COLUMNS, BLOCK_M, BLOCK_N, PROXY_FENCE)  # fmt: skip
    else:
        while index < max_tiles * NUM_N:
            tile = tile_of(index, max_tiles, tile_experts_ptr, NUM_N, GROUP_M, 1)
            if tile[3] >= 0:
                if index >= gl.num_programs(0):
                    begin_again(rings)
                _up_tile(rings, tile, side, routing, epilogue, x_ptr, stride_xm, weights_desc, N, K, TOP_K, ACTIVATION,
                         GATED, INTERLEAVED, HAS_LIMIT, FORMAT, SCALE_COLUMNS, BLOCK_M, BLOCK_N, PROXY_FENCE
                         )  # fmt: skip
            index += gl.num_programs(0)


@gluon.jit(do_not_specialize=["max_tiles", "num_routes", "stride_be", "max_rows"])
def packed_down_kernel(
    act_ptr, weights_desc, bias_ptr, rows_ptr, sorted_routes_ptr, tile_experts_ptr, max_tiles, num_routes, max_rows,
    stride_am, stride_be, stride_rm,
    scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE_COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    ONE_TILE: gl.constexpr, PROXY_FENCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """rows[p, :N] = act[p] @ w2[e]^T + b2[e] for the sorted rows p, act in planes; padding rows are never stored.

    SPLITS programs share a tile, each with its own steps along K, and its own rows in fp32, which the combine adds up.
    """
    rings = start(weights_desc, act_ptr.dtype.element_ty, BLOCK_M, STAGES)
    NUM_N: gl.constexpr = triton.cdiv(N, BLOCK_N)
    side = (scale_ptr, stride_se, stride_sn, stride_sk, zero_ptr, stride_ze, stride_zn, stride_zk)
    routing = (sorted_routes_ptr, num_routes)
    epilogue = (bias_ptr, stride_be, rows_ptr, stride_rm, max_rows)
    index = gl.program_id(0)
    if ONE_TILE:
        tile = tile_of(index, max_tiles, tile_experts_ptr, NUM_N, GROUP_M, SPLITS)
        _down_tile(rings, tile, side, routing, epilogue, act_ptr, stride_am, weights_desc, N, K, FORMAT, SCALE_COLUMNS,
                   BLOCK_M, BLOCK_N, SPLITS, PDL, PROXY_FENCE)  # fmt: skip
    else:
        while index < max_tiles * NUM_N * SPLITS:
            tile = tile_of(index, max_tiles, tile_experts_ptr, NUM_N, GROUP_M, SPLITS)
            if tile[3] >= 0:
                if index >= gl.num_programs(0):
                    begin_again(rings)
                _down_tile(rings, tile, side, routing, epilogue, act_ptr, stride_am, weights_desc, N, K, FORMAT,
                           SCALE_COLUMNS, BLOCK_M, BLOCK_N, SPLITS, PDL, PROXY_FENCE)  # fmt: skip
            index += gl.num_programs(0)
