"""The router: a token's scores, its groups and experts by rank, their weights. A program for each token."""

import triton
import triton.language as tl

# Ranks are compared as integers of 64 bits: the score, then the lower number. Below them all is what is not to be had.
_TAKEN = tl.constexpr(-(2**63))


@triton.jit
def _rank(score, number):
    """Integers in the order of (score, -number); NaN counts as -inf, and -0 as 0."""
    score = tl.where(score == score, score + 0.0, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def _score(rank):
    """The score in a rank."""
    ordered = (rank >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _number(rank):
    """The number in a rank."""
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _scores(x, SCORING: tl.constexpr):
    """Scores of logits; absent logits are -inf."""
    if SCORING == "softmax":
        weights = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = weights / tl.sum(tl.sum(weights, 1), 0)
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


@triton.jit(do_not_specialize=["factor"])
def topk_route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, factor, stride_lm, stride_le,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, TOP2: tl.constexpr, EPSILON: tl.constexpr, GROUPS_POW2: tl.constexpr,
    SIZE_POW2: tl.constexpr, TOP_K_POW2: tl.constexpr,
):  # fmt: skip
    """weights[m], ids[m] of the TOP_K best experts; expert = group * SIZE + member, in a tile [groups, members]."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POW2)[:, None]
    member = tl.arange(0, SIZE_POW2)[None, :]
    expert = group * SIZE + member
    present = (group < GROUPS) & (member < SIZE)
    x = tl.load(logits_ptr + token * stride_lm + expert.to(tl.int64) * stride_le, mask=present, other=float("-inf")).to(
        tl.float32
    )
    scores = _scores(x, SCORING)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=present, other=0.0).to(tl.float32)
    rank = tl.where(present, _rank(choice, expert), _TAKEN)

    if TOP_GROUPS < GROUPS:
        best = tl.max(rank, 1)
        best_of_group = _score(best)
        if TOP2:
            best_of_group += _score(tl.max(tl.where(rank == best[:, None], _TAKEN, rank), 1))
        number = tl.arange(0, GROUPS_POW2)
        group_rank = tl.where(number < GROUPS, _rank(best_of_group, number), _TAKEN)
        kept = tl.zeros((GROUPS_POW2,), tl.int1)
        for _ in range(TOP_GROUPS):
            first = tl.max(group_rank, 0)
            kept = kept | (group_rank == first)
            group_rank = tl.where(group_rank == first, _TAKEN, group_rank)
        rank = tl.where(kept[:, None], rank, _TAKEN)

    columns = tl.arange(0, TOP_K_POW2)
    ids = tl.zeros((TOP_K_POW2,), tl.int32)
    weights = tl.zeros((TOP_K_POW2,), tl.float32)
    for k in range(TOP_K):
        first = tl.max(tl.max(rank, 1), 0)
        is_first = rank == first
        weight = tl.sum(tl.sum(tl.where(is_first, scores, 0.0), 1), 0)
        ids = tl.where(columns == k, _number(first), ids)
        weights = tl.where(columns == k, weight, weights)
        rank = tl.where(is_first, _TAKEN, rank)
    if SCORING == "topk_softmax":
        weights = tl.where(columns < TOP_K, weights, float("-inf"))
        weights = tl.exp(weights - tl.max(weights, 0))
        weights = weights / tl.sum(weights, 0)
    elif RENORMALIZE:
        weights = weights / (tl.sum(tl.where(columns < TOP_K, weights, 0.0), 0) + EPSILON)
    at = token * TOP_K + columns
    tl.store(weights_ptr + at, weights * factor, mask=columns < TOP_K)
    tl.store(ids_ptr + at, ids, mask=columns < TOP_K)
