"""Mutations of the kernels' sources: one small mistake each, of the kind that kernels have had."""

from tests.mutants.exchange import EXCHANGE_MUTATIONS
from tests.mutants.mutation import Mutation
from tests.mutants.router import ROUTER_MUTATIONS

# fmt: off
MUTATIONS = [
    Mutation(
        "rows_past_k", "grouped_gemm", "mask = row_mask[:, None] & (columns < end)[None, :]",
        "mask = row_mask[:, None]", "tail of K unmasked in the rows", "classic plain",
    ),
    Mutation(
        "weights_past_k", "grouped_gemm", "mask=(stored + step_offsets < K // PLANES)[:, None] & w_mask[None, :]",
        "mask=w_mask[None, :]", "tail of K unmasked in the weights", "classic plain",
    ),
    Mutation(
        "k_tail_skipped", "grouped_gemm", "for k in range(first, end, BLOCK_K):",
        "for k in range(first, end - BLOCK_K + 1, BLOCK_K):", "a last step that is not full is not run",
        "classic plain",
    ),
    Mutation(
        "expert_without_offset", "grouped_gemm", "w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + w_rows",
        "w_ptrs = w_ptr + w_rows", "every expert multiplies with expert 0", "classic plain",
    ),
    Mutation(
        "expert_offset_int32", "grouped_gemm", "w_ptr + expert.to(tl.int64) * stride_we", "w_ptr + expert * stride_we",
        "offset of an expert beyond 2^31 elements wraps", "offsets beyond int32, sorted",
    ),
    Mutation(
        "token_offset_int32", "grouped_gemm", "x_ptr + (routes // top_k).to(tl.int64)[:, None] * stride_xm",
        "x_ptr + (routes // top_k)[:, None] * stride_xm", "offset of a token beyond 2^31 elements wraps",
        "offsets beyond int32, sorted",
    ),
    Mutation(
        "weight_strides_swapped", "grouped_gemm", "w_rows.to(tl.int64)[None, :] * stride_wn",
        "w_rows.to(tl.int64)[None, :] * stride_wk", "rows of weights by the stride of K", "classic plain",
    ),
    Mutation(
        "padding_row_gathered", "grouped_gemm", "row_mask = routes < num_routes\n    x_ptrs",
        "row_mask = routes <= num_routes\n    x_ptrs", "padding rows read the token past the last", "classic plain",
    ),
    Mutation(
        "interleaved_rows_halved", "grouped_gemm", "N = 2 * I if INTERLEAVED else I\n    x_scale",
        "N = I\n    x_scale", "interleaved weights end at half their rows", "classic biases_interleaved",
    ),
    Mutation(
        "tma_halves_one_block", "grouped_gemm", "w_desc.load([expert, 0, n, k])", "w_desc.load([expert, 0, 0, k])",
        "every column block loads the first", "tma tails_in_both_dimensions",
    ),
    Mutation(
        "bias_of_expert_0", "grouped_gemm", "tl.load(bias_ptr + expert.to(tl.int64) * stride_be + b_rows",
        "tl.load(bias_ptr + b_rows", "offset of the bias without the expert", "classic biases_interleaved",
    ),
    Mutation(
        "last_column_not_stored", "grouped_gemm", "mask=row_mask[:, None] & (columns < H)[None, :]",
        "mask=row_mask[:, None] & (columns < H - 1)[None, :]", "off by one in the mask of the store", "classic plain",
    ),
    Mutation(
        "groups_overlap", "grouped_gemm", "first_m = (pid // width) * GROUP_M", "first_m = pid // width",
        "row blocks of the second group are not visited", "row blocks in groups",
    ),
    Mutation(
        "gate_row_too_many", "layout", "in_half < I", "in_half <= I", "one row past an expert's last is read",
        "classic plain",
    ),
    Mutation(
        "gemv_step_not_advanced", "gemv", "k += BLOCK_K", "k += 0", "every step multiplies the first columns",
        "direct plain",
    ),
    Mutation(
        "gemv_vector_past_k", "gemv", "stride_vg, False)", "stride_vg, True)", "the vector is read past K",
        "direct plain",
    ),
    Mutation(
        "gemv_first_step_unmasked", "gemv", "mask=v_mask if EVEN_K else v_mask & (k < K)", "mask=v_mask",
        "a first step larger than K is not masked", "direct plain",
    ),
    Mutation(
        "gemv_expert_offset_int32", "gemv", "w_ptr + experts.to(tl.int64) * stride_we", "w_ptr + experts * stride_we",
        "offset of an expert beyond 2^31 elements wraps", "offsets beyond int32, direct",
    ),
    Mutation(
        "gemv_earlier_slots_lost", "gemv", "total += tl.sum(y", "total = tl.sum(y",
        "only the last step of slots is summed", "more slots than a step, direct",
    ),
    Mutation(
        "gemv_slot_past_top_k", "gemv", "mask=(slots < top_k) & (columns < H))", "mask=columns < H)",
        "slots that are none are stored over the next token", "nothing beside the result, direct",
    ),
    Mutation(
        "id_one_past_the_last", "route", "known = (ids >= 0) & (ids < num_ids)",
        "known = (ids >= 0) & (ids <= num_ids)", "the expert map is read one past its end", "sort in one launch",
    ),
    Mutation(
        "id_narrowed_first", "route", "ids = tl.load(ids_ptr + offsets, mask=mask, other=-1)",
        "ids = tl.load(ids_ptr + offsets, mask=mask, other=-1).to(tl.int32)", "2^32 + 1 becomes expert 1",
        "sort in one launch",
    ),
    Mutation(
        "ties_reversed", "route", "(local[None, :] < local[:, None])", "(local[None, :] > local[:, None])",
        "an expert's routes in reversed order within a chunk", "sort in three launches",
    ),
    Mutation(
        "scan_inclusive", "route", "total + tl.cumsum(counts, 0) - counts", "total + tl.cumsum(counts, 0)",
        "a chunk's routes start after themselves", "sort in three launches",
    ),
    Mutation(
        "scan_forgets_steps", "route", "total += tl.sum(counts, 0)", "total = tl.sum(counts, 0)",
        "chunks of earlier scan steps are not counted", "sort in three launches",
    ),
    Mutation(
        "empty_expert_gets_a_block", "route", "(counts + BLOCK - 1) // BLOCK * BLOCK", "(counts // BLOCK + 1) * BLOCK",
        "a full or empty expert is padded by a block too many", "sort in one launch",
    ),
    Mutation(
        "inverse_off_by_one", "route",
        "tl.sum(earlier.to(tl.int32), 1), -1)\n    tl.store(inverse_ptr + routes, rows, mask=mask)",
        "tl.sum(earlier.to(tl.int32), 1), -1)\n    tl.store(inverse_ptr + routes, rows + 1, mask=mask)",
        "the combine takes the row after", "sort in one launch",
    ),
    Mutation(
        "block_past_the_last_alive", "route", "tl.where(alive, experts, -1)", "experts",
        "row blocks that are not there have an expert", "sort in one launch",
    ),
    Mutation(
        "last_slot_lost", "combine", "mask=k < top_k, other=-1", "mask=k < top_k - 1, other=-1",
        "the last slot of a token contributes nothing", "classic plain",
    ),
    Mutation(
        "dropped_weight_read", "combine", "mask=row >= 0, other=0.0)", "mask=k < top_k, other=0.0)",
        "the NaN weight of a dropped route times 0", "classic hostile_ids_int32",
    ),
    Mutation(
        "weight_of_token_0", "combine", "router_weights_ptr + route,", "router_weights_ptr + k,",
        "all tokens take the first one's router weights", "classic plain",
    ),
    Mutation(
        "unsummed_in_one_slot", "combine", "tl.store(out_ptrs + k.to(tl.int64) * stride_ok,", "tl.store(out_ptrs,",
        "summands overwrite each other", "classic routes_unsummed",
    ),
    Mutation(
        "part_left_out", "combine", "tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)",
        "rows without the second part of K", "down GEMM in parts",
    ),
    Mutation(
        "bias_of_every_part", "grouped_gemm", "columns < tl.where(split == 0, H, 0)", "columns < H",
        "parts of K add the bias each", "down GEMM in parts", in_full=True,
    ),
    Mutation(
        "parts_overlap", "grouped_gemm", "end = tl.minimum(first + part, I)", "end = I",
        "a part goes on to the end of K", "down GEMM in parts", in_full=True,
    ),
    Mutation("factor_forgotten", "combine", "(total * factor)", "total", "routed_scaling_factor", "classic scaled"),
    Mutation(
        "up_plus_one_forgotten", "activation", "up = up + 1.0", "up = up", "swigluoai's up + 1", "classic swigluoai",
    ),
    Mutation(
        "clamp_one_sided", "activation", "tl.where(up < -limit, -limit, up)", "up", "up is clamped from above only",
        "classic silu_clamped",
    ),
    Mutation(
        "alpha_ignored", "activation", "_logistic(x, alpha * x, PTX)", "_logistic(x, 1.702 * x, PTX)",
        "swigluoai's own slope", "classic swigluoai_own_slope",
    ),
    Mutation("relu_not_squared", "activation", "y = y * y", "y = y", "relu2's square", "classic relu2_no_gate"),
    Mutation(
        "nibbles_swapped", "dequantize", "nibble_values((q.to(tl.int32) >> (BITS * plane))",
        "nibble_values((q.to(tl.int32) >> (BITS * (plane ^ 1)))", "the odd column in the low nibble",
        "classic int4",
    ),
    Mutation(
        "e2m1_sign_lost", "dequantize", "((q & 8) << 28) | ", "", "weights of e2m1 without their sign", "classic mxfp4",
    ),
    Mutation(
        "e8m0_nan_dropped", "dequantize", "tl.where(e == _E8M0_NAN, float(\"nan\"), power)", "power",
        "a scale that is NaN becomes infinity", "scales that are nan, sorted",
    ),
    Mutation(
        "int4_zero_off_by_one", "dequantize", "_INT4_ZERO = tl.constexpr(8.0)", "_INT4_ZERO = tl.constexpr(7.0)",
        "weights without zero points stand around 7", "classic int4",
    ),
    Mutation(
        "int8_zero_off_by_one", "dequantize", "_INT8_ZERO = tl.constexpr(128.0)", "_INT8_ZERO = tl.constexpr(127.0)",
        "zero points stand around 127", "classic int8_weights_zero_points",
    ),
    Mutation(
        "zero_row_not_packed", "dequantize", "        return rows // 2\n", "        return rows\n",
        "zero points of twice the row", "classic int4_zero_points",
    ),
    Mutation(
        "zero_nibble_of_the_neighbour", "dequantize", "((odd >> 4) + (even & 15))", "((even >> 4) + (odd & 15))",
        "zero points of the other row of a pair", "classic int4_zero_points",
    ),
    Mutation(
        "scale_row_of_a_smaller_block", "dequantize", "rows // SCALE_ROWS", "rows // (SCALE_ROWS + 32)",
        "rows of a weight by the scale of the block before", "classic fp8_block",
    ),
    Mutation(
        "scale_of_expert_0", "grouped_gemm", "row_ptrs(scale_ptr, expert, ", "row_ptrs(scale_ptr, expert * 0, ",
        "every expert by the scales of expert 0", "classic int8_channel",
    ),
    Mutation(
        "scale_row_of_the_gate", "grouped_gemm", "scale_rows(w_rows, SCALE_ROWS)",
        "scale_rows(n + tl.arange(0, COLUMNS) % BLOCK_N, SCALE_ROWS)", "up rows by the scales of their gate rows",
        "classic int8_channel",
    ),
    Mutation(
        "zero_row_of_the_gate", "grouped_gemm", "zero_rows(w_rows, FORMAT)",
        "zero_rows(n + tl.arange(0, COLUMNS) % BLOCK_N, FORMAT)", "up rows with the zero points of their gate rows",
        "classic int4_zero_points",
    ),
    Mutation(
        "groups_of_the_first_step", "grouped_gemm", "group = k // (PARTS * PART) * PARTS + part", "group = part",
        "every step by the scales of the first", "classic int4",
    ),
    Mutation(
        "groups_past_k", "grouped_gemm", "there = there & (k + part * PART < K)", "there = there",
        "scales of groups past the last are read", "classic mxfp4",
    ),
    Mutation(
        "block_of_the_first_step", "grouped_gemm", "k // SCALE_COLUMNS, tl.int64", "0 // SCALE_COLUMNS, tl.int64",
        "every step by the block scales of the first", "classic fp8_block",
    ),
    Mutation(
        "row_scale_of_the_first_step", "grouped_gemm", "k // 128", "0 * k",
        "every step by the rows' scales of the first", "classic fp8_block",
    ),
    Mutation(
        "row_scale_forgotten", "grouped_gemm", "acc *= tl.load(a_scale_ptrs", "acc += 0 * tl.load(a_scale_ptrs",
        "rows without their scales", "classic int8_channel",
    ),
    Mutation(
        "row_scale_of_the_route", "grouped_gemm", "expert, routes // top_k, stride_xse", "expert, routes, stride_xse",
        "hidden states by the scale of another token", "classic int8_channel",
    ),
    Mutation(
        "packed_step_twice_as_long", "grouped_gemm", "stored = k // PLANES", "stored = k",
        "a step of packed weights skips as many", "classic int4",
    ),
    Mutation(
        "plane_ends_with_garbage", "grouped_gemm", "if pid_n == num_n - 1:", "if pid_n == num_n:",
        "what is behind the last column of act in planes is not zero", "classic int4",
    ),
    Mutation(
        "units_not_in_order", "layout", "4, UNIT // 2, 2).permute(0, 1, 3, 2, 4)", "4, UNIT // 2, 2)",
        "weights in the order they are stored, rows in that of planes", "classic int4",
    ),
    Mutation(
        "scale_of_the_neighbour", "layout", "units.reshape(N, BLOCKS, 4)[:, :, None, :, None]",
        "units.reshape(N, BLOCKS, 4)[:, :, :, None, None]", "every pair of a unit by the scale of another unit",
        "classic mxfp4",
    ),
    Mutation(
        "nan_row_scaled", "quantize", "tl.where(tl.max((y != y).to(tl.int32), 1) > 0, float(\"nan\"), scale)", "scale",
        "a row with a NaN has a scale that is none", "rows of int8_channel",
    ),
    Mutation(
        "zeros_divided_by_zero", "quantize", "tl.maximum(tl.div_rn(largest, LARGEST), _FLOAT_TINY)",
        "tl.div_rn(largest, LARGEST)", "a row of zeros has a scale of 0", "rows of fp8_channel",
    ),
    Mutation(
        "int8_not_saturated", "quantize", "tl.where(q > LARGEST, LARGEST, tl.where(q < -LARGEST, -LARGEST, q))", "q",
        "infinity as whatever the conversion makes of it", "rows of int8_channel",
    ),
    Mutation(
        "int8_truncated", "quantize", "(q + _ROUND) - _ROUND", "q", "rounded towards zero", "rows of int8_channel",
    ),
    Mutation(
        "last_group_unmasked", "quantize", "kept[:, None] & (columns < K)", "kept[:, None]",
        "a short last group is read and written beyond its row", "rows of fp8_block",
    ),
    Mutation(
        "last_group_left_out", "quantize", "kept[:, None] & (columns < K)",
        "kept[:, None] & (columns < K // WIDTH * WIDTH)", "a short last group counts as zeros", "rows of fp8_block",
    ),
    Mutation(
        "scale_of_group_0_stored", "quantize", "scale_ptr + row * stride_sm + group * stride_sg",
        "scale_ptr + row * stride_sm", "groups' scales overwrite each other", "rows of fp8_block",
    ),
    Mutation(
        "given_scale_of_expert_0", "quantize", "given_ptr + expert.to(tl.int64) * stride_ge", "given_ptr + 0 * expert",
        "the activation of every expert by the scale of expert 0", "classic fp8_static_expert",
    ),
    Mutation(
        "zeros_divided_by_a_given_zero", "quantize", "return tl.where(tl.abs(scale) < _FLOAT_TINY, _FLOAT_TINY, scale)",
        "return scale", "zeros divided by a given scale of 0", "scales of zero",
    ),
    Mutation(
        "gemv_group_of_stored_columns", "gemv", "* VECTOR) * PLANES // SCALE_COLUMNS", "* VECTOR) // SCALE_COLUMNS",
        "groups counted in bytes, with two columns each", "direct int4",
    ),
    Mutation(
        "gemv_zero_twice", "gemv", "(zero - no_zero(FORMAT)) * tl.sum", "zero * tl.sum",
        "weights with zero points stand around the middle too", "direct int4_zero_points",
    ),
    Mutation(
        "gemv_input_scale_of_group_0", "gemv", "k // 128", "0 * k", "hidden states by the scales of their first group",
        "direct fp8_block_given",
    ),
    *ROUTER_MUTATIONS,
    *EXCHANGE_MUTATIONS,
]
# fmt: on
