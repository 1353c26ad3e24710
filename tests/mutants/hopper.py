"""Mutations of the warp-specialised kernels, to be found emulated and on a Hopper GPU.

A mistake in the barriers may hang, give wrong numbers, or both in turns. Of the races a GPU may show nothing for years;
the emulator has to find them.
"""

from tests.mutants.mutation import Mutation

# fmt: off
HOPPER_MUTATIONS = [
    Mutation(
        "full_parity", "pingpong", "mbarrier.wait(full.index(stage), (index // STAGES) & 1)",
        "mbarrier.wait(full.index(stage), ((index // STAGES) & 1) ^ 1)", "a stage is read a pass too early",
        "pingpong plain",
    ),
    Mutation(
        "empty_parity_of_the_gather", "pingpong",
        "mbarrier.wait(empty.index(stage), ((index // STAGES) & 1) ^ 1)\n                cp_async",
        "mbarrier.wait(empty.index(stage), (index // STAGES) & 1)\n                cp_async",
        "the gather waits for a pass that nobody has begun", "pingpong plain",
    ),
    Mutation(
        "empty_not_waited_for", "pingpong",
        "mbarrier.wait(empty.index(stage), ((index // STAGES) & 1) ^ 1)\n            bar", "bar",
        "TMA overwrites weights that are being read", "pingpong many K steps",
    ),
    Mutation(
        "last_empty_arrive_missing", "pingpong",
        "        mbarrier.arrive(empty.index((first + K_STEPS + STAGES - 1) % STAGES), count=1)\n", "",
        "the last stage of a tile is never given back", "pingpong plain",
    ),
    Mutation(
        "turn_not_passed", "pingpong", "mbarrier.arrive(turn.index(1 - CONSUMER), count=1)",
        "mbarrier.arrive(turn.index(CONSUMER), count=1)", "the other consumer never gets its turn", "pingpong plain",
    ),
    Mutation(
        "turn_parity", "pingpong", "(1 - CONSUMER) ^ ((step // 2) & 1)", "CONSUMER ^ ((step // 2) & 1)",
        "consumer 1 begins and consumer 0 waits", "pingpong plain",
    ),
    Mutation(
        "full_counts_one_gather_warp", "pingpong", "1 + 32 * _GATHER_WARPS if GATHER", "1 + 32 if GATHER",
        "a stage counts as full when half its rows are there", "pingpong plain",
    ),
    Mutation(
        "full_counts_one_too_many", "pingpong", "1 + 32 * _GATHER_WARPS if GATHER", "2 + 32 * _GATHER_WARPS if GATHER",
        "no stage is ever full", "pingpong plain",
    ),
    Mutation(
        "half_the_bytes_announced", "pingpong", "(LOADED_ROWS + COLUMNS) * BLOCK_K *",
        "(LOADED_ROWS + COLUMNS // 2) * BLOCK_K *", "a stage counts as full before its up rows are there",
        "pingpong plain",
    ),
    Mutation(
        "gather_past_k", "pingpong", "mask = row_mask & (k + k_offsets < K)[None, :]", "mask = row_mask",
        "columns of the next token times weights of 0; past the last token, anything", "pingpong plain",
    ),
    Mutation(
        "only_the_last_k_step", "pingpong", "use_acc=k_step > 0", "use_acc=False",
        "a step forgets those before it", "pingpong plain",
    ),
    Mutation(
        "expert_of_this_tile", "pingpong", " " * 16 + "next_expert = expert_of(tile_experts_ptr, next_block_m, num_m)",
        " " * 16 + "next_expert = expert_of(tile_experts_ptr, block_m, num_m)",
        "a tile multiplies with the expert of the tile before", "pingpong many K steps",
    ),
    Mutation(
        "last_columns_stored_elsewhere", "pingpong", "next_n = first_column(next_block_n, N, BLOCK_N)",
        "next_n = next_block_n * BLOCK_N", "the last tile is stored where one of whole columns would be",
        "pingpong last columns",
    ),
    Mutation(
        "bias_past_n", "ahead", "exist = rows < 2 * N", "exist = rows < 2 * N - 1",
        "the last column has no bias", "pingpong biases_interleaved",
    ),
    Mutation(
        "scales_of_the_first_expert", "pingpong", "sources, next_expert, next_block_m,",
        "sources, expert, next_block_m,", "tiles of a consumer have the scales of its first expert",
        "pingpong fp8_channel",
    ),
    Mutation(
        "scales_of_the_first_rows", "pingpong", "scales, out_scale = next_scales, next_out_scale",
        "out_scale = next_out_scale", "tiles of a consumer have the scales of its first rows", "pingpong fp8_channel",
    ),
    Mutation(
        "padding_rows_stored", "epilogue", "skipped = gl.minimum(gl.maximum(", "skipped = 0 * gl.minimum(gl.maximum(",
        "rows that nobody reads are stored", "pingpong padding",
    ),
    Mutation(
        "last_row_of_a_block_lost", "epilogue", "(i + 1) * ROWS - used", "(i + 1) * ROWS - used + 1",
        "a row is taken for padding", "pingpong plain",
    ),
    Mutation(
        "clipped_box_begins_too_late", "epilogue", "[first - skipped, skipped, column]", "[first, skipped, column]",
        "rows of a block with padding are stored behind their places", "pingpong plain",
    ),
    Mutation(
        "rows_used_of_the_first_tile", "pingpong", "routes = routes_of(sorted_routes_ptr, next_block_m * BLOCK_M,",
        "routes = routes_of(sorted_routes_ptr, block_m * BLOCK_M,", "a tile ends where the one before ends",
        "pingpong last columns",
    ),
    Mutation(
        "blockscaled_weights_empty_parity", "rings", "mbarrier.wait(empty.index(FIRST + stage), phase)",
        "mbarrier.wait(empty.index(FIRST + stage), phase ^ 1)",
        "the weights wait for a pass that nobody has begun", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_rows_full_parity", "blockscaled",
        "mbarrier.wait(rows_full.index(ROWS_BARRIER + a), a_phase, pred=k_step + 1 < K_STEPS)",
        "mbarrier.wait(rows_full.index(ROWS_BARRIER + a), a_phase ^ 1, pred=k_step + 1 < K_STEPS)",
        "rows are multiplied before they are there", "blockscaled many K steps",
    ),
    Mutation(
        "blockscaled_promotion_lost", "blockscaled", "acc0 += partial * factor",
        "acc0 = partial * factor", "only the last 128 columns count", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_scale_of_the_other_half", "rings", "store((scales1 if half else scales0)",
        "store((scales0)", "the up half by the scale of the gate's", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_scales_of_the_first_group", "rings", "            scale_ptrs += stride_sg\n", "",
        "rows have one scale for all of K", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_scales_a_step_late", "rings", "                scales1 = next1\n", "",
        "the second half has the scales of the first K step", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_cut_ignored", "blockscaled", "factor = gl.where(before_cut, factor, after_cut)", "pass",
        "the up half by the scale of the block that it begins in", "blockscaled fp8_block",
    ),
    Mutation(
        "act_divided_by_a_given_zero", "ahead", "given_scale(gl.load(out_scale_ptr + expert64 * stride_oe))",
        "gl.load(out_scale_ptr + expert64 * stride_oe)", "zeros divided by a given scale of 0",
        "pingpong scales of zero",
    ),
    Mutation(
        "packed_full_parity", "packed", "mbarrier.wait(full.index(stage), phase)",
        "mbarrier.wait(full.index(stage), phase ^ 1)", "a stage is read a pass too early", "packed int4",
    ),
    Mutation(
        "packed_full_counts_one_filler", "packed_ring", "mbarrier.init(full.index(i), count=2)",
        "mbarrier.init(full.index(i), count=1)", "a stage counts as full when weights or rows are there", "packed int4",
    ),
    Mutation(
        "packed_empty_not_waited_for", "packed_ring",
        "mbarrier.wait(empty.index(stage), phase)\n            bar =", "bar =",
        "TMA overwrites weights that are being read", "packed many K steps",
    ),
    Mutation(
        "packed_rows_in_wgmmas_order", "packed", "return row // 2 + row % 2 * 4", "return row",
        "rows of a result are stored in the order of wgmma's", "packed int4",
    ),
    Mutation(
        "packed_scale_of_the_first_block", "packed", "acc += total1 * scales(scale1", "acc += total1 * scales(scale0",
        "the second block of a step by the scale of the first one of the next step", "packed int4",
    ),
    Mutation(
        "packed_zero_point_of_the_neighbour", "packed", "odd = rows % 2", "odd = 1 - rows % 2",
        "a row by the zero point in the other half of its byte", "packed int4_zero_points",
    ),
    Mutation(
        "packed_large_scale_as_it_is", "pairs", "@!large bra done;", "bra done;",
        "scales above 2 are those of numbers below 0 or infinite", "packed every scale",
    ),
    Mutation(
        "packed_large_scale_of_one_row", "pairs", "setp.ge.or.u32 large", "setp.ge.and.u32 large",
        "a scale above 2 is seen where the other row of a thread has one too", "packed every scale",
    ),
    Mutation(
        "packed_scale_that_is_no_number", "pairs", "selp.b32 factor, {_both(0x7FC0)}, factor, is;", "",
        "the scale of NaN is 2^128", "packed every scale",
    ),
    Mutation(
        "packed_planes_swapped", "packed_operand", "gl.join(first, second)", "gl.join(second, first)",
        "each of two planes is multiplied with the other's rows", "packed int4",
    ),
    Mutation(
        "packed_bias_in_every_part", "packed", "gl.where(split == 0, N, 0)", "N",
        "each part of K adds the bias", "packed in parts",
    ),
    Mutation(
        "packed_parts_overlap", "packed_ring", "gl.minimum(split * PART + PART, STEPS)",
        "gl.minimum(split * PART + PART + 1, STEPS)", "a step is in two parts", "packed in parts",
    ),
    Mutation(
        "packed_first_tile_again", "packed_ring", "tile(index // SPLITS,", "tile(gl.program_id(0) // SPLITS,",
        "a program's second tile is its first once more", "packed many tiles",
    ),
    Mutation(
        "packed_rings_as_they_were", "packed_ring", "    _begin(full, empty, STAGES)\n    fence", "    fence",
        "a second tile has no barriers", "packed many tiles",
    ),
    Mutation(
        "packed_planes_end_in_what_was_there", "packed", "if WIDTH * PLANES > N and block_n", "if N < 0 and block_n",
        "columns behind a plane's last are multiplied as they are", "packed int4",
    ),
    Mutation(
        "mixed_empty_parity", "mixed", "mbarrier.wait(empty.index(place), phase)",
        "mbarrier.wait(empty.index(place), phase ^ 1)", "the filler waits for a pass that nobody has begun",
        "mixed int8",
    ),
    Mutation(
        "mixed_bytes_of_the_weights", "mixed", "2 * (WIDTH * ROWS + PARTS * COLUMNS * BLOCK_M)", "2 * WIDTH * ROWS",
        "a stage counts as full before its rows are there", "mixed int8",
    ),
    Mutation(
        "mixed_rows_of_the_other_plane", "mixed", ".slice(plane * WIDTH, WIDTH, dim=1)",
        ".slice((plane ^ 1) * WIDTH, WIDTH, dim=1)",
        "odd columns of the weights are multiplied with even ones of the rows",
        "mixed int8",
    ),
    Mutation(
        "mixed_numbers_of_this_step", "mixed", "source = gl.where(more, FIRST + stage, place)", "source = place",
        "a part's first columns are multiplied with those of the next step", "mixed int8",
    ),
    Mutation(
        "mixed_scales_of_the_gate", "mixed_operand", "if INTERLEAVED else half * N + column",
        "if INTERLEAVED else column",
        "up by the scales and the bias of the gate", "mixed int8",
    ),
    Mutation(
        "mixed_act_in_its_own_order", "mixed", "    if PLANES > 1:\n", "    if PLANES > 4:\n",
        "the columns of act are not in planes", "mixed int8",
    ),
    Mutation(
        "mixed_half_of_a_full_block", "mixed", "used <= BLOCK_M // 2", "used < BLOCK_M",
        "a block counts as half empty when its last row is padding", "mixed full blocks",
    ),
    Mutation(
        "mixed_one_scale_of_two", "mixed_operand", "= COLUMNS // LAYOUT.shape[1]", "= 0 * COLUMNS",
        "both groups of a part have the scale of the first", "mixed mxfp4",
    ),
    Mutation(
        "mixed_scales_of_the_next_part", "mixed", "there, COLUMNS, K, SCALE_COLUMNS, GROUP)\n        if HAS_ZERO",
        "there, 2 * COLUMNS, K, SCALE_COLUMNS, GROUP)\n        if HAS_ZERO",
        "the second part has the scales of the third", "mixed mxfp4",
    ),
    Mutation(
        "mixed_zero_point_of_the_other_row", "mixed_operand", "zero_ptrs, rows % 2, exist",
        "zero_ptrs, 1 - rows % 2, exist", "rows take each other's zero points", "mixed int4_zero_points",
    ),
    Mutation(
        "mixed_scale_of_few_bits", "mixed_operand", "rest = gl.where(rest - rest == 0.0, rest, 0.0)",
        "rest = gl.where(rest - rest == 0.0, 0.0, 0.0)", "scales are rounded to bfloat16", "mixed fine scales",
    ),
    Mutation(
        "mixed_rows_of_the_first_slot", "planes", "inverse_ptr + tokens * TOP_K + k", "inverse_ptr + tokens * TOP_K",
        "a token is copied to the row of its first route alone", "mixed int8",
    ),
    Mutation(
        "mixed_zeros_times_infinity", "mixed", "if ACTIVATION is not None and N % COLUMNS:", "if N < 0:",
        "columns that do not exist are no numbers beside infinities", "mixed infinite",
    ),
]
RACES = [
    Mutation(
        "stage_given_back_too_early", "pingpong",
        "acc = warpgroup_mma_wait(1, deps=(pending,))", "acc = pending",
        "a stage is filled while wgmma may read it", "pingpong many K steps",
    ),
    Mutation(
        "sum_used_too_early", "pingpong", "acc = warpgroup_mma_wait(0, deps=(acc,))",
        "acc = warpgroup_mma_wait(1, deps=(acc,))", "the last K step may be missing in the sum", "pingpong plain",
    ),
    Mutation(
        "gathered_rows_without_a_fence", "pingpong", "            if FENCE:\n", "            if FENCE and K < 0:\n",
        "wgmma may read what was there before the rows", "pingpong plain",
    ),
    Mutation(
        "box_without_a_fence", "epilogue", "    fence_async_shared()\n", "",
        "TMA may store what was there before the box", "pingpong plain",
    ),
    Mutation(
        "box_overwritten", "epilogue", "    tma.store_wait(PENDING)\n", "", "a box is written while TMA may read it",
        "pingpong plain",
    ),
    Mutation(
        "second_box_overwritten", "pingpong", "PENDING=BUFFERS - 1", "PENDING=2 * (BUFFERS - 1)",
        "one of two boxes is written while TMA may read it", "pingpong plain",
    ),
    Mutation(
        "partial_sum_used_too_early", "blockscaled", "partial = warpgroup_mma_wait(0", "partial = warpgroup_mma_wait(1",
        "the sum of a turn may not be there when it is added", "blockscaled fp8_block",
    ),
    Mutation(
        "rows_announced_too_early", "rings", "async_copy.wait_group(1)", "async_copy.wait_group(2)",
        "wgmma may read rows that are on their way", "blockscaled fp8_block",
    ),
    Mutation(
        "blockscaled_rows_given_back_too_early", "blockscaled",
        "mbarrier.arrive(rows_empty.index(ROWS_BARRIER + read_a), count=1, pred=k_step > 0)",
        "mbarrier.arrive(rows_empty.index(ROWS_BARRIER + a), count=1, pred=k_step > 0)",
        "rows are overwritten while wgmma may read them", "blockscaled many K steps",
    ),
    Mutation(
        "packed_sum_used_too_early", "packed", "total1 = warpgroup_mma_wait(0,", "total1 = warpgroup_mma_wait(1,",
        "the last two planes may be missing in the sum", "packed int4",
    ),
    Mutation(
        "packed_rows_announced_too_early", "packed_ring", "async_copy.wait_group(1)", "async_copy.wait_group(2)",
        "wgmma may read rows that are on their way", "packed many K steps",
    ),
    Mutation(
        "packed_stage_given_back_too_early", "packed",
        "total1 = warpgroup_mma_wait(0, deps=(total1,))\n        mbarrier.arrive(empty.index(stage), count=1)\n",
        "mbarrier.arrive(empty.index(stage), count=1)\n        total1 = warpgroup_mma_wait(0, deps=(total1,))\n",
        "a stage is filled while wgmma may read it", "packed many K steps",
    ),
    Mutation(
        "mixed_stage_given_back_too_early", "mixed",
        "acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier.arrive(empty.index(place), count=1)\n",
        "mbarrier.arrive(empty.index(place), count=1)\n        acc = warpgroup_mma_wait(0, deps=(acc,))\n",
        "a stage is filled while wgmma may read it", "mixed many K steps",
    ),
]
# fmt: on
