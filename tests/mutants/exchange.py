"""Mutations of expert parallelism's kernels: which row goes where, what it holds, the sum of those that come back."""

from tests.mutants.mutation import Mutation

# fmt: off
EXCHANGE_MUTATIONS = [
    Mutation(
        "token_past_the_last_placed", "exchange", "mask = (tokens < num_tokens)[:, None] & (slots < TOP_K)[None, :]",
        "mask = (tokens >= 0)[:, None] & (slots < TOP_K)[None, :]", "ids past the last token are read", "place",
        in_full=True,
    ),
    Mutation(
        "slot_past_top_k_placed", "exchange", "(tokens < num_tokens)[:, None] & (slots < TOP_K)[None, :]",
        "(tokens < num_tokens)[:, None] & (slots >= 0)[None, :]", "slots of the next token are this one's", "place",
    ),
    Mutation(
        "dropped_slot_has_a_rank", "exchange", "tl.where(known, ranks, -1), mask=mask)", "ranks, mask=mask)",
        "an id that is no expert's has the rank after the last", "place",
    ),
    Mutation(
        "dropped_slot_of_expert_0", "exchange", "tl.load(local_of_ptr + experts, mask=known, other=-1)",
        "tl.load(local_of_ptr + experts, mask=known, other=0)", "an id that is no expert's is expert 0", "place",
        in_full=True,
    ),
    Mutation(
        "last_slot_of_a_rank", "exchange", "(slots > step)", "(slots < step)",
        "the row belongs to a token's last slot of a rank", "place", in_full=True,
    ),
    Mutation(
        "slots_counted", "exchange", "tl.reshape(first, (TOKENS * TOP_K_POW2,))",
        "tl.reshape(ranks, (TOKENS * TOP_K_POW2,))", "a rank counts a token once for each of its experts", "place",
    ),
    Mutation(
        "counts_past_the_last_rank", "exchange", "mask=(bins < NUM_RANKS) & (counts > 0)", "mask=counts > 0",
        "slots without a row are counted behind the last rank", "place",
    ),
    Mutation(
        "rows_before_include_the_rank", "exchange", "bins[None, :] < rank[:, None]", "bins[None, :] <= rank[:, None]",
        "a rank's rows begin behind themselves", "place, 3 rows a rank", in_full=True,
    ),
    Mutation(
        "row_past_capacity", "exchange", "tl.where(place < capacity, rank", "tl.where(place <= capacity, rank",
        "a rank's row too many is the next rank's first", "place, 3 rows a rank",
    ),
    Mutation(
        "rows_not_spread", "exchange", "rank * capacity + place, _NO_ROOM", "row, _NO_ROOM",
        "ranks begin where the one before ends, not at their capacity", "place, 3 rows a rank",
    ),
    Mutation(
        "no_room_in_silence", "exchange", "rank * capacity + place, _NO_ROOM", "rank * capacity + place, -1",
        "a row without room counts as none", "place, 3 rows a rank",
    ),
    Mutation(
        "slot_past_top_k_packed", "exchange", "mask = slots < TOP_K\n", "mask = slots >= 0\n",
        "experts and weights are read past the last slot", "pack plain, a row a token", in_full=True,
    ),
    Mutation(
        "expert_one_past_the_last", "exchange", "(experts < num_experts)", "(experts <= num_experts)",
        "an id that is one too large is sent", "pack plain, a row a token", in_full=True,
    ),
    Mutation(
        "expert_narrowed_first", "exchange", "tl.load(experts_ptr + program * TOP_K + slots, mask=mask, other=-1)",
        "tl.load(experts_ptr + program * TOP_K + slots, mask=mask, other=-1).to(tl.int32)", "2^40 becomes expert 0",
        "pack plain, a row a token",
    ),
    Mutation(
        "experts_of_other_ranks", "exchange", "kept = tl.where(ranks == rank, experts, -1)", "kept = experts",
        "a row names the experts of other ranks too", "pack plain, uneven splits",
    ),
    Mutation(
        "lost_less_what_is_free", "exchange", "tl.maximum(counts - capacity, 0)", "counts - capacity",
        "rows without room are set off against room elsewhere", "pack plain, 3 rows a rank",
    ),
    Mutation(
        "token_row_offset_int32", "exchange", "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)",
        "offset of a token beyond 2^31 elements wraps", "pack far apart",
    ),
    Mutation(
        "units_of_the_first_step", "exchange", "units = first // WIDTH + tl.arange(0, UNITS)",
        "units = tl.arange(0, UNITS)", "a wide row is its first columns alone", "pack wide plain",
    ),
    Mutation(
        "scales_over_the_experts", "exchange", "tl.int32, bitcast=True), mask=units < SCALES)",
        "tl.int32, bitcast=True))", "units past the last have scales, where the experts are", "pack wide group",
    ),
    Mutation(
        "columns_past_h_sent", "exchange", "tl.store(out_ptr + row * stride_on + columns, x, mask=columns < H)",
        "tl.store(out_ptr + row * stride_on + columns, x)", "a row is written past its last column",
        "pack wide plain", in_full=True,
    ),
    Mutation(
        "given_scales_in_one_word", "exchange", "tl.store(words + scale_word + index,", "tl.store(words + scale_word,",
        "scales that are given overwrite each other", "pack given, 3 rows a rank",
    ),
    Mutation(
        "given_scale_of_group_0", "exchange", "group * stride_sg", "0 * stride_sg",
        "every group by the scale of the first", "pack given, 3 rows a rank", in_full=True,
    ),
    Mutation(
        "row_after_the_last_filled", "exchange", "rank.to(tl.int64) * capacity < count",
        "rank.to(tl.int64) * capacity <= count", "the row after a rank's last is not emptied",
        "pack plain, 16 rows a rank",
    ),
    Mutation(
        "empty_row_of_expert_0", "exchange", "tl.full((TOP_K_POW2,), -1, tl.int32)",
        "tl.full((TOP_K_POW2,), 0, tl.int32)", "a row that no token has goes to expert 0",
        "pack plain, 16 rows a rank", in_full=True,
    ),
    Mutation(
        "lost_unsaid_in_empty_rows", "exchange", "mask=slots < TOP_K)\n            tl.store(words + lost_word, lost)",
        "mask=slots < TOP_K)", "a rank without rows does not hear of those without room",
        "pack plain, 16 rows a rank",
    ),
    Mutation(
        "slot_past_top_k_summed", "exchange", "mask=k < top_k, other=-1)", "mask=k >= 0, other=-1)",
        "the last step adds rows of the next token", "combine",
    ),
    Mutation(
        "returned_row_offset_int32", "exchange", "mask=k < top_k, other=-1).to(tl.int64)", "mask=k < top_k, other=-1)",
        "offset of a row beyond 2^31 elements wraps", "combine far apart", in_full=True,
    ),
    Mutation(
        "row_before_the_first_read", "exchange", "mask=columns < tl.where(row >= 0, H, 0)", "mask=columns < H",
        "a slot without a row adds what lies before the buffer", "combine",
    ),
    Mutation(
        "no_room_adds_nothing", "exchange", "tl.where(row == _NO_ROOM, float(\"nan\"), value.to(tl.float32))",
        "value.to(tl.float32)", "a sum without one of its rows looks like a sum", "combine",
    ),
    Mutation(
        "last_row_alone", "exchange", "total += tl.where(row", "total = tl.where(row", "rows are not added", "combine",
        in_full=True,
    ),
    Mutation(
        "columns_of_the_first_block", "exchange", "(tl.program_id(0) % num_h) * BLOCK_H + ", "",
        "a wide result is its first columns alone", "combine wide", in_full=True,
    ),
    Mutation(
        "infinity_is_the_largest", "exchange", "tl.where(size < float(\"inf\"), size, 0.0)", "size",
        "numbers beside an infinity, or NaN, are scaled to nothing", "halve",
    ),
    Mutation(
        "largest_beyond_float16", "exchange", "tl.minimum(141 -", "tl.minimum(144 -",
        "a row's largest numbers overflow on their way back", "halve", in_full=True,
    ),
    Mutation(
        "own_rows_halved", "exchange", "tl.where(row >= first, count, 0)", "0",
        "rows that stay are sent in the place of those behind them", "halve", in_full=True,
    ),
    Mutation(
        "ranks_behind_read_one_on", "exchange", "tl.where(k > rank, 1, 0)", "0",
        "sums of the ranks behind this one are the next one's", "sum ranks",
    ),
]
# fmt: on
