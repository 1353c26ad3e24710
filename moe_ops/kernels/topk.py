"""The router: a token's scores, its groups and experts by rank, their weights. A program for each token."""

import triton
import triton.language as tl

# Choices are compared as integers of 32 bits, which a warp reduces in one instruction. Below them all: not to be had.
_TAKEN = tl.constexpr(-(2**31))
_NO_EXPERT = tl.constexpr(2**31 - 1)


@triton.jit
def _key(score):
    """Integers in the order of scores; NaN counts as -inf, and -0 as 0."""
    bits = tl.where(score == score, score + 0.0, float("-inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of_key(key):
    """The score of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scores(x, highest, total, SCORING: tl.constexpr):
    """Scores of logits; `highest` logit and `total` of exp(x - highest) are the token's, for "softmax"."""
    if SCORING == "softmax":
        scores = tl.exp(x - highest) / total
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    elif SCORING == "sqrtsoftplus":
        # log(1 + e) of a small e: what 1 + e rounded away is put back.
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        scores = tl.sqrt(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p)
    else:
        scores = x
    return scores


@triton.jit
def _kept_groups(key, number, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """Whether each group is one of the TOP_GROUPS best (or no group): its members' keys and numbers are a row."""
    best = tl.max(key, 1)
    score = _score_of_key(best)
    if TOP2:
        first = tl.min(tl.where(key == best[:, None], number, _NO_EXPERT), 1)
        score += _score_of_key(tl.max(tl.where(number == first[:, None], _TAKEN, key), 1))
    group = tl.arange(0, key.shape[0])
    group_key = tl.where(group < GROUPS, _key(score), _TAKEN)
    for _ in range(TOP_GROUPS):
        lowest = tl.min(tl.where(group_key == tl.max(group_key, 0), group, _NO_EXPERT), 0)
        group_key = tl.where(group == lowest, _TAKEN, group_key)
    return group_key == _TAKEN


@triton.jit(do_not_specialize=["factor"])
def topk_route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, factor, stride_lm, stride_le,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, TOP2: tl.constexpr, EPSILON: tl.constexpr, GROUPS_POW2: tl.constexpr,
    SIZE_POW2: tl.constexpr, TOP_K_POW2: tl.constexpr,
):  # fmt: skip
    """weights[m], ids[m] of the TOP_K best experts; a row of groups, each of SIZE_POW2 places for its SIZE members."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, GROUPS_POW2 * SIZE_POW2)
    group, member = place // SIZE_POW2, place % SIZE_POW2
    present = (group < GROUPS) & (member < SIZE)
    # Of places without an expert the number is one that none has.
    expert = tl.where(present, group * SIZE + member, -1)
    row_ptr = logits_ptr + token * stride_lm
    x = tl.load(row_ptr + expert.to(tl.int64) * stride_le, mask=present, other=float("-inf")).to(tl.float32)
    highest, total = 0.0, 1.0
    if SCORING == "softmax":
        highest = tl.max(x, 0)
        total = tl.sum(tl.exp(x - highest), 0)
    choice = _scores(x, highest, total, SCORING)
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=present, other=0.0).to(tl.float32)
    key = tl.where(present, _key(choice), _TAKEN)
    if TOP_GROUPS < GROUPS:
        tile: tl.constexpr = (GROUPS_POW2, SIZE_POW2)
        kept = _kept_groups(tl.reshape(key, tile), tl.reshape(expert, tile), GROUPS, TOP_GROUPS, TOP2)
        kept = tl.reshape(tl.broadcast_to(kept[:, None], tile), (GROUPS_POW2 * SIZE_POW2,))
        key = tl.where(kept, key, _TAKEN)

    columns = tl.arange(0, TOP_K_POW2)
    ids = tl.zeros((TOP_K_POW2,), tl.int32)
    for k in range(TOP_K):
        first = tl.min(tl.where(key == tl.max(key, 0), expert, _NO_EXPERT), 0)
        ids = tl.where(columns == k, first, ids)
        key = tl.where(expert == first, _TAKEN, key)
    chosen = columns < TOP_K
    # Read once more, from the L1: to carry the scores along would cost a sum over all experts in every turn.
    x = tl.load(row_ptr + ids.to(tl.int64) * stride_le, mask=chosen, other=float("-inf")).to(tl.float32)
    weights = _scores(x, highest, total, SCORING)
    if SCORING == "topk_softmax":
        weights = tl.exp(weights - tl.max(weights, 0))
        weights = weights / tl.sum(weights, 0)
    elif RENORMALIZE:
        weights = weights / (tl.sum(tl.where(chosen, weights, 0.0), 0) + EPSILON)
    at = token * TOP_K + columns
    tl.store(weights_ptr + at, weights * factor, mask=chosen)
    tl.store(ids_ptr + at, ids, mask=chosen)
