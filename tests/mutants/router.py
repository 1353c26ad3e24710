"""Mutations of the router's kernel: the order of choices, groups, places without an expert, weights."""

from tests.mutants.mutation import Mutation

# fmt: off
ROUTER_MUTATIONS = [
    Mutation(
        "nan_above_all", "topk", "tl.where(score == score, score + 0.0, float(\"-inf\"))", "(score + 0.0)",
        "a score that is NaN is the best", "router gpt_oss",
    ),
    Mutation(
        "minus_zero_below_zero", "topk", "score + 0.0", "score", "-0 is not a tie with 0", "router gpt_oss",
    ),
    Mutation(
        "negative_keys_reversed", "topk", "return bits ^ ((bits >> 31) & 0x7FFFFFFF)", "return bits",
        "of negative scores the lowest is the best", "router negative logits",
    ),
    Mutation(
        "negative_key_not_turned_back", "topk", "return (key ^ ((key >> 31) & 0x7FFFFFFF))", "return key",
        "groups by other scores than their experts' where those are negative", "router negative logits", in_full=True,
    ),
    Mutation(
        "log1p_of_what_rounding_left", "topk",
        "tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))", "tl.log(u)",
        "scores of very negative logits are 0", "router very negative logits",
    ),
    Mutation(
        "top2_of_different_scores", "topk", "tl.where(number == first[:, None], _TAKEN, key)",
        "tl.where(key == best[:, None], _TAKEN, key)", "of a group's two best that are equal one counts",
        "router two equal best",
    ),
    Mutation(
        "second_best_alone", "topk", "score += _score_of_key(", "score = _score_of_key(",
        "a group's score is its second best expert's", "router deepseek_v3", in_full=True,
    ),
    Mutation(
        "tied_group_to_the_last", "topk", "tl.min(tl.where(group_key == tl.max(group_key, 0), group, _NO_EXPERT), 0)",
        "tl.max(tl.where(group_key == tl.max(group_key, 0), group, -1), 0)", "of equal groups the last is kept",
        "router deepseek_v2",
    ),
    Mutation(
        "group_too_few", "topk", "for _ in range(TOP_GROUPS):", "for _ in range(TOP_GROUPS - 1):",
        "the last of the groups is not kept", "router deepseek_v3", in_full=True,
    ),
    Mutation(
        "left_out_as_minus_infinity", "topk", "key = tl.where(kept, key, _TAKEN)",
        "key = tl.where(kept, key, -(0x7F800000 + 1))", "an expert of no kept group is a tie with -inf of a kept one",
        "router left out groups",
    ),
    Mutation(
        "expert_past_the_last", "topk", "present = (group < GROUPS) & (member < SIZE)", "present = group < GROUPS",
        "a row is read past its last expert", "router many_experts",
    ),
    Mutation(
        "group_past_the_last", "topk", "present = (group < GROUPS) & (member < SIZE)", "present = member < SIZE",
        "a row is read past its last group", "router odd_groups", in_full=True,
    ),
    Mutation(
        "experts_by_place", "topk", "group * SIZE + member", "group * SIZE_POW2 + member",
        "groups as long as their places", "router deepseek_v2", in_full=True,
    ),
    Mutation(
        "places_in_the_softmax", "topk",
        "expert.to(tl.int64) * stride_le, mask=present, other=float(\"-inf\"))",
        "expert.to(tl.int64) * stride_le, mask=present, other=0.0)", "places without an expert add to the softmax",
        "router deepseek_v2",
    ),
    Mutation(
        "place_chosen", "topk", "key = tl.where(present, _key(choice), _TAKEN)", "key = _key(choice)",
        "a place without an expert is a tie with -inf", "router many_experts",
    ),
    Mutation(
        "router_row_offset_int32", "topk", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)",
        "offset of a row beyond 2^31 elements wraps", "router strides",
    ),
    Mutation(
        "highest_not_subtracted", "topk", "highest = tl.max(x, 0)", "highest = 0.0",
        "softmax of large logits overflows", "router large logits",
    ),
    Mutation(
        "highest_of_the_chosen_not_subtracted", "topk", "tl.exp(weights - tl.max(weights, 0))", "tl.exp(weights)",
        "softmax of large logits of the chosen overflows", "router large logits of the chosen", in_full=True,
    ),
    Mutation(
        "tie_to_the_last", "topk", "first = tl.min(tl.where(key == tl.max(key, 0), expert, _NO_EXPERT), 0)",
        "first = tl.max(tl.where(key == tl.max(key, 0), expert, -1), 0)", "of equal scores the last is chosen",
        "router olmoe",
    ),
    Mutation(
        "equal_scores_taken_at_once", "topk", "tl.where(expert == first, _TAKEN, key)",
        "tl.where(key == tl.max(key, 0), _TAKEN, key)", "of equal scores one is chosen", "router olmoe", in_full=True,
    ),
    Mutation(
        "chosen_without_stride", "topk", "ids.to(tl.int64) * stride_le", "ids",
        "scores of the chosen are read where a dense row has them", "router strides",
    ),
    Mutation(
        "column_past_top_k_in_the_softmax", "topk",
        "ids.to(tl.int64) * stride_le, mask=chosen, other=float(\"-inf\"))",
        "ids.to(tl.int64) * stride_le, mask=chosen, other=0.0)", "columns past top_k add to the softmax of the chosen",
        "router grouped_logits",
    ),
    Mutation(
        "bias_in_the_weights", "topk", "weights = _scores(x, highest, total, SCORING)\n",
        "weights = _scores(x, highest, total, SCORING)\n    if bias_ptr is not None:\n"
        "        weights += tl.load(bias_ptr + ids, mask=chosen, other=0.0).to(tl.float32)\n",
        "the bias of the choice is weighed too", "router deepseek_v3",
    ),
    Mutation(
        "epsilon_forgotten", "topk", "(tl.sum(tl.where(chosen, weights, 0.0), 0) + EPSILON)",
        "tl.sum(tl.where(chosen, weights, 0.0), 0)", "weights that all underflowed are NaN", "router deepseek_v3",
    ),
    Mutation(
        "router_factor_forgotten", "topk", "weights * factor", "weights", "routed_scaling_factor",
        "router deepseek_v2",
    ),
    Mutation(
        "rows_of_columns", "topk", "at = token * TOP_K + columns", "at = token * TOP_K_POW2 + columns",
        "results as far apart as their columns", "router deepseek_v2", in_full=True,
    ),
]
# fmt: on
