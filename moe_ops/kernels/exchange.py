"""Expert parallelism: which row a token has for which rank, the rows that are sent, the sum of those that come back.

The definitions are those of `moe_ops.exchange`.
"""

import triton
import triton.language as tl

from moe_ops.kernels.quantize import quantize, row_scales
from moe_ops.kernels.route import local_experts

_NO_ROOM = tl.constexpr(-2)


@triton.jit(do_not_specialize=["num_tokens", "num_ids"])
def first_slots_kernel(
    ids_ptr, rank_of_ptr, local_of_ptr, ranks_ptr, local_ptr, first_ptr, counts_ptr, num_tokens, num_ids,
    TOP_K: tl.constexpr, NUM_RANKS: tl.constexpr, TOKENS: tl.constexpr, TOP_K_POW2: tl.constexpr,
    RANKS_POW2: tl.constexpr,
):  # fmt: skip
    """Rank and local expert of every slot; first[m, k]: the rank again, in the first slot that a token has there.

    Integers are added to counts in any order: the sum is the same.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.arange(0, TOP_K_POW2)
    offsets = tokens[:, None] * TOP_K + slots[None, :]  # [TOKENS, TOP_K_POW2]
    mask = (tokens < num_tokens)[:, None] & (slots < TOP_K)[None, :]
    ranks = local_experts(ids_ptr, rank_of_ptr, offsets, mask, num_ids, NUM_RANKS)
    known = mask & (ranks < NUM_RANKS)
    experts = tl.load(ids_ptr + offsets, mask=known, other=0).to(tl.int32)
    local = tl.load(local_of_ptr + experts, mask=known, other=-1)
    tl.store(ranks_ptr + offsets, tl.where(known, ranks, -1), mask=mask)
    tl.store(local_ptr + offsets, local, mask=mask)
    earlier = tl.zeros((TOKENS, TOP_K_POW2), tl.int32)
    for step in tl.static_range(TOP_K):
        # The rank of slot `step`, for every slot behind it to compare with.
        other = tl.sum(tl.where(slots[None, :] == step, ranks, 0), 1)
        earlier += ((ranks == other[:, None]) & (slots > step)[None, :]).to(tl.int32)
    first = tl.where(known & (earlier == 0), ranks, NUM_RANKS)
    tl.store(first_ptr + offsets, tl.where(first < NUM_RANKS, first, -1), mask=mask)
    counts = tl.histogram(tl.reshape(first, (TOKENS * TOP_K_POW2,)), RANKS_POW2)
    bins = tl.arange(0, RANKS_POW2)
    tl.atomic_add(counts_ptr + bins, counts, mask=(bins < NUM_RANKS) & (counts > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_routes", "capacity"])
def spread_kernel(rows_ptr, first_ptr, counts_ptr, num_routes, capacity, NUM_RANKS: tl.constexpr,
                  RANKS_POW2: tl.constexpr, ROUTES: tl.constexpr):  # fmt: skip
    """Rows one rank behind the other -> rows of ranks that have `capacity` each; -2 past a rank's last row."""
    routes = tl.program_id(0) * ROUTES + tl.arange(0, ROUTES)
    mask = routes < num_routes
    row = tl.load(rows_ptr + routes, mask=mask, other=-1)
    rank = tl.load(first_ptr + routes, mask=mask, other=-1)
    bins = tl.arange(0, RANKS_POW2)
    counts = tl.load(counts_ptr + bins, mask=bins < NUM_RANKS, other=0)
    before = tl.sum(tl.where(bins[None, :] < rank[:, None], counts[None, :], 0), 1)
    place = row - before
    spread = tl.where(place < capacity, rank * capacity + place, _NO_ROOM)
    tl.store(rows_ptr + routes, tl.where(row >= 0, spread, -1), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_experts", "capacity"])
def pack_kernel(
    x_ptr, scale_ptr, weights_ptr, experts_ptr, ranks_ptr, rows_ptr, counts_ptr,
    out_ptr, out_words_ptr, num_tokens, num_rows, num_experts, capacity, H, stride_xm, stride_xh, stride_sm, stride_sg,
    stride_on, stride_ow, scale_word, expert_word, weight_word, lost_word,
    TOP_K: tl.constexpr, TOP_K_POW2: tl.constexpr, SLOTS: tl.constexpr, SCALES: tl.constexpr, GIVEN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LARGEST: tl.constexpr, NUM_RANKS: tl.constexpr,
    RANKS_POW2: tl.constexpr,
):  # fmt: skip
    """A program writes the rows of one token, and one more row if nobody else does: row i of the send buffer.

    A token is read once for every rank that it goes to, from the cache after the first. Its columns go in units of
    WIDTH, UNITS of them at once; with SCALES and not GIVEN each unit is quantised with a scale of its own.
    """
    program = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, TOP_K_POW2)
    bins = tl.arange(0, RANKS_POW2)
    lost = 0
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + bins, mask=bins < NUM_RANKS, other=0)
        lost = tl.sum(tl.where(capacity > 0, tl.maximum(counts - capacity, 0), 0), 0)
    if program < num_tokens:
        mask = slots < TOP_K
        experts = tl.load(experts_ptr + program * TOP_K + slots, mask=mask, other=-1)
        experts = tl.where((experts >= 0) & (experts < num_experts), experts, -1).to(tl.int32)
        weights = tl.load(weights_ptr + program * TOP_K + slots, mask=mask, other=0.0).to(tl.float32)
        if ranks_ptr is not None:
            ranks = tl.load(ranks_ptr + program * TOP_K + slots, mask=mask, other=-1)
        for slot in range(SLOTS):
            row = program.to(tl.int64)
            if rows_ptr is not None:
                row = tl.load(rows_ptr + program * TOP_K + slot).to(tl.int64)
            if row >= 0:
                words = out_words_ptr + row * stride_ow
                kept = experts
                if ranks_ptr is not None:
                    rank = tl.load(ranks_ptr + program * TOP_K + slot)
                    kept = tl.where(ranks == rank, experts, -1)
                tl.store(words + expert_word + slots, kept, mask=mask)
                tl.store(words + weight_word + slots, weights.to(tl.int32, bitcast=True), mask=mask)
                tl.store(words + lost_word, lost)
                for first in range(0, H, WIDTH * UNITS):
                    units = first // WIDTH + tl.arange(0, UNITS)
                    columns = units[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [UNITS, WIDTH]
                    x = tl.load(x_ptr + program * stride_xm + columns.to(tl.int64) * stride_xh, mask=columns < H,
                                other=0.0)  # fmt: skip
                    if SCALES > 0:
                        if not GIVEN:
                            wide = x.to(tl.float32)
                            scale = row_scales(wide, LARGEST)
                            x = quantize(wide, scale[:, None], out_ptr.dtype.element_ty, LARGEST)
                            tl.store(words + scale_word + units, scale.to(tl.int32, bitcast=True), mask=units < SCALES)
                    tl.store(out_ptr + row * stride_on + columns, x, mask=columns < H)
                if GIVEN:
                    for index in range(SCALES):
                        group = (tl.zeros((), tl.int32) + index).to(tl.int64)
                        scale = tl.load(scale_ptr + program * stride_sm + group * stride_sg)
                        tl.store(words + scale_word + index, scale.to(tl.int32, bitcast=True))
    if program < num_rows:
        # Without room to spare (capacity 0) every row that is sent is some token's.
        filled = program < num_tokens
        if counts_ptr is not None:
            rank = (program // tl.maximum(capacity, 1)).to(tl.int32)
            count = tl.sum(tl.where(bins == rank, counts, 0), 0)
            filled = (capacity == 0) | (program - rank.to(tl.int64) * capacity < count)
        if not filled:
            words = out_words_ptr + program * stride_ow
            tl.store(words + expert_word + slots, tl.full((TOP_K_POW2,), -1, tl.int32), mask=slots < TOP_K)
            tl.store(words + lost_word, lost)


@triton.jit(do_not_specialize=["first", "count"])
def halve_kernel(partial_ptr, out_ptr, scale_ptr, first, count, H, stride_pn, stride_on, stride_sn,
                 BLOCK_H: tl.constexpr):  # fmt: skip
    """Rows of fp32, all but `count` of them, times a power of two in fp16, and what undoes it: a program writes one."""
    row = tl.program_id(0).to(tl.int64)
    source = row + tl.where(row >= first, count, 0)
    columns = tl.arange(0, BLOCK_H)
    x = tl.load(partial_ptr + source * stride_pn + columns, mask=columns < H, other=0.0)
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 0)
    shift = tl.minimum(141 - (largest.to(tl.int32, bitcast=True) >> 23), 126)
    power = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(out_ptr + row * stride_on + columns, (x * power).to(tl.float16), mask=columns < H)
    tl.store(scale_ptr + row * stride_sn, ((127 - shift) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["top_k", "num_tokens", "rank"])
def sum_kernel(
    back_ptr, scale_ptr, rows_ptr, own_ptr, out_ptr, top_k, num_tokens, rank, H, stride_bn, stride_sn, stride_wm,
    stride_om, BLOCK_H: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[m] = sum_k back[rows[m, k]] in fp32, in the order of k; a row -1 adds nothing, a row -2 makes it NaN.

    Without rows k are ranks: of each but `rank` num_tokens rows came back, and its own are own[m]. With scales a row
    is multiplied by its own.
    """
    num_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // num_h).to(tl.int64)
    columns = (tl.program_id(0) % num_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, top_k, UNROLL):
        for step in tl.static_range(UNROLL):
            k = first + step
            if rows_ptr is not None:
                row = tl.load(rows_ptr + token * top_k + k, mask=k < top_k, other=-1).to(tl.int64)
            else:
                place = (k - tl.where(k > rank, 1, 0)).to(tl.int64) * num_tokens + token
                row = tl.where((k < top_k) & (k != rank), place, -1)
            # Masks compare columns with a bound: the interpreter cannot AND a vector with a scalar condition.
            value = tl.load(back_ptr + row * stride_bn + columns, mask=columns < tl.where(row >= 0, H, 0), other=0.0)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row * stride_sn, mask=row >= 0, other=0.0)
                value = value.to(tl.float32) * scale
            if own_ptr is not None:
                value += tl.load(own_ptr + token * stride_wm + columns, mask=columns < tl.where(k == rank, H, 0),
                                 other=0.0)  # fmt: skip
            total += tl.where(row == _NO_ROOM, float("nan"), value.to(tl.float32))
    tl.store(out_ptr + token * stride_om + columns, total.to(out_ptr.dtype.element_ty), mask=columns < H)
