"""What expert parallelism sends between ranks: the layout of a row, and its steps in torch (the CPU's, and the oracle).

A token that has experts on a rank travels there once, as one row of bytes: its hidden state, its scales where that is
quantised, and for each of its top_k slots the expert's number on that rank (-1: elsewhere, or nowhere) and the routing
weight. So there is one collective on the way out, whatever travels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_ops.quantization import quantize_activations
from moe_ops.quantization.scheme import GROUP

# Rows start where 16 bytes can be loaded at once, and where the op finds hidden states aligned.
_PART, _ROW = 16, 128

NOWHERE, NO_ROOM = -1, -2

# Of float32, and the exponent of a row's largest number on its way back: 2^15 and twice that are float16's.
_MANTISSA, _BIAS, _TOP = 23, 127, 14


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a row are, in bytes: values, scales, experts, weights, and what found no room at the sender.

    Attributes:
        hidden_size: H.
        top_k: slots of a token.
        dtype: of the values.
        scales: float32 scales of a row: 0, 1, or one for each 128 columns.
        scale_offset: where the scales start.
        expert_offset: where the experts start, int32.
        weight_offset: where the routing weights start, float32.
        lost_offset: where the sender says how many rows found no room, int32.
        row_bytes: from one row to the next.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    scales: int = 0
    scale_offset: int = field(init=False, repr=False, compare=False)
    expert_offset: int = field(init=False, repr=False, compare=False)
    weight_offset: int = field(init=False, repr=False, compare=False)
    lost_offset: int = field(init=False, repr=False, compare=False)
    row_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scale = _up(self.hidden_size * self.dtype.itemsize, _PART)
        expert = _up(scale + 4 * self.scales, _PART)
        weight = expert + 4 * self.top_k
        lost = weight + 4 * self.top_k
        object.__setattr__(self, "scale_offset", scale)
        object.__setattr__(self, "expert_offset", expert)
        object.__setattr__(self, "weight_offset", weight)
        object.__setattr__(self, "lost_offset", lost)
        object.__setattr__(self, "row_bytes", _up(lost + 4, _ROW))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Rows:
    """Rows as views of the bytes that arrived.

    Attributes:
        hidden_states: [N, H].
        scale: float32 [N, scales], or None.
        topk_ids: int32 [N, top_k].
        topk_weights: float32 [N, top_k].
        lost: int32 [N].
    """

    hidden_states: Tensor
    scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    lost: Tensor


def read_rows(payload: Tensor, layout: RowLayout) -> Rows:
    """Views of rows of bytes [N, row_bytes]."""
    words, first = payload.view(torch.int32), layout.expert_offset // 4
    numbers = payload.view(torch.float32)
    weights, scales = layout.weight_offset // 4, layout.scale_offset // 4
    return Rows(
        payload.view(layout.dtype)[:, : layout.hidden_size],
        numbers[:, scales : scales + layout.scales] if layout.scales else None,
        words[:, first : first + layout.top_k],
        numbers[:, weights : weights + layout.top_k],
        words[:, layout.lost_offset // 4],
    )


def place_rows(
    topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decides which row of the send buffer each token has for each rank.

    Args:
        topk_ids: [M, top_k] int32 or int64, any values.
        rank_of: int32 [E], each expert's rank; a value outside 0 .. num_ranks - 1 is nobody's.
        local_of: int32 [E], its number there.
        num_ranks: W.
        capacity: rows of each rank in the send buffer; 0: as many as there are, one rank's behind the other's.

    Returns:
        int32: the rank of each slot [M, top_k] and the expert's number there (both -1 for an id that is no expert's),
        the row of the first slot of each token and rank [M, top_k] (-1 for other slots, -2 where the rank's rows are
        full), and the rows that each rank should get [W].
    """
    ids, num_experts = topk_ids.long(), rank_of.shape[0]
    known = (ids >= 0) & (ids < num_experts)
    safe = torch.where(known, ids, 0)
    ranks = torch.where(known, rank_of[safe], -1)
    known = (ranks >= 0) & (ranks < num_ranks)
    ranks = torch.where(known, ranks, -1)
    local = torch.where(known, local_of[safe], -1)
    same = (ranks[:, :, None] == ranks[:, None, :]).tril(-1).any(2)
    first = known & ~same
    targets = torch.arange(num_ranks, device=ids.device, dtype=torch.int32)
    here = (first[:, :, None] & (ranks[:, :, None] == targets)).any(1)  # [M, W]
    counts = here.sum(0, dtype=torch.int32)
    order = here.cumsum(0, dtype=torch.int32) - 1
    starts = targets * capacity if capacity else counts.cumsum(0, dtype=torch.int32) - counts
    index = ranks.clamp(min=0).long()
    place = order.gather(1, index)
    rows = torch.where(first, starts[index] + place, NOWHERE)
    if capacity:
        rows = torch.where(first & (place >= capacity), NO_ROOM, rows)
    return ranks.int(), local.int(), rows.int(), counts


def pack_rows(
    hidden_states: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    experts: Tensor,
    ranks: Tensor | None,
    rows: Tensor | None,
    counts: Tensor | None,
    num_rows: int,
    num_experts: int,
    capacity: int,
    dtype: torch.dtype,
    scales: int,
) -> Tensor:
    """Writes the rows that are sent.

    Args:
        hidden_states: [M, H].
        scale: float32 [M, scales] of hidden states that are quantised already, or None.
        topk_weights: [M, top_k].
        experts: [M, top_k] int32 or int64; those outside 0 .. num_experts - 1 are written as -1.
        ranks: as from `place_rows`: a row has the slots of its rank; None: it has all.
        rows: as from `place_rows`; None: token m has row m.
        counts: as from `place_rows`, or None.
        num_rows: of the result.
        num_experts: bound of the experts.
        capacity: rows of a rank; those that no token has get experts -1; 0: nothing is written there.
        dtype: of the values; where hidden states have another, they are quantised to it.
        scales: float32 scales of a row.

    Returns:
        uint8 [num_rows, row_bytes] as `RowLayout` has it.
    """
    (num_tokens, hidden), top_k = hidden_states.shape, experts.shape[1]
    layout = RowLayout(hidden, top_k, dtype, scales)
    payload = hidden_states.new_empty((num_rows, layout.row_bytes), dtype=torch.uint8)
    out = read_rows(payload, layout)
    if scales and scale is None:
        hidden_states, scale = quantize_activations(hidden_states, dtype, "group" if scales > 1 else "token")
    if capacity or ranks is None:
        out.topk_ids.fill_(NOWHERE)
    lost: int | Tensor = 0
    if counts is not None and capacity:
        lost = (counts - capacity).clamp(min=0).sum().int()
    out.lost[:] = lost
    ids = torch.where((experts >= 0) & (experts < num_experts), experts, NOWHERE).int()
    if rows is None:
        token = slot = torch.arange(num_tokens, device=ids.device)
        where = token
    else:
        token, slot = (rows >= 0).nonzero(as_tuple=True)
        where = rows[token, slot].long()
    if ranks is not None:
        ids = torch.where(ranks[token] == ranks[token, slot][:, None], ids[token], NOWHERE)
    else:
        ids = ids[token]
    # Bytes, because a copy by index does not exist for fp8.
    values = hidden_states[token] if dtype.itemsize > 1 else hidden_states.view(torch.uint8)[token].view(dtype)
    out.hidden_states.view(torch.uint8)[where] = values.contiguous().view(torch.uint8)
    out.topk_ids[where] = ids
    out.topk_weights[where] = topk_weights[token].float()
    if out.scale is not None and scale is not None:
        out.scale[where] = scale.float()[token].expand(-1, scales)
    return payload


def half_bytes(hidden_size: int) -> int:
    """Bytes of a partial sum that travels in 16 bits: float16 values, then a float32 to multiply them by."""
    # In units that make the stride a multiple of 16 elements: Triton then moves 16 bytes at once, else 2.
    return _up(_up(2 * hidden_size, _PART) + 4, 2 * _PART)


def read_halves(payload: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Views of rows of bytes [N, half_bytes(H)]: float16 [N, H] and float32 [N]."""
    scale = _up(2 * hidden_size, _PART) // 4
    return payload.view(torch.float16)[:, :hidden_size], payload.view(torch.float32)[:, scale]


def halve_rows(partial: Tensor, first: int, count: int) -> Tensor:
    """Partial sums in 16 bits: a row times the power of two that brings its largest number to 2^14 .. 2^15, in float16.

    So nothing overflows, and a number keeps 11 bits unless it is less than 2^-28 of its row's largest. Infinities and
    NaN stay what they are, and do not count as the largest.

    Args:
        partial: float32 [N, H].
        first: of the rows that are left out.
        count: how many are.

    Returns:
        uint8 [N - count, half_bytes(H)], as `read_halves` has it.
    """
    kept = torch.cat([partial[:first], partial[first + count :]])
    payload = kept.new_empty((kept.shape[0], half_bytes(kept.shape[1])), dtype=torch.uint8)
    values, scale = read_halves(payload, kept.shape[1])
    size = kept.abs()
    size = torch.where(size < torch.inf, size, 0)
    # An exponent as it is stored, so that the power and its inverse have one, too.
    exponent = size.amax(1).view(torch.int32) >> _MANTISSA
    shift = (_TOP + _BIAS - exponent).clamp(max=_BIAS - 1)
    values[:] = (kept * ((shift + _BIAS) << _MANTISSA).view(torch.float32)[:, None]).half()
    scale[:] = ((_BIAS - shift) << _MANTISSA).view(torch.float32)
    return payload


def sum_ranks(own: Tensor, back: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """out[m] = sum of the partial sums of token m, in float32 and in the order of the ranks.

    Args:
        own: float32 [M, H], this rank's.
        back: uint8 [(W - 1) * M, half_bytes(H)], those of the others, one rank's behind the other's.
        rank: this one's.
        dtype: of the result.

    Returns:
        [M, H] in `dtype`.
    """
    values, scale = read_halves(back, own.shape[1])
    others = list((values.float() * scale[:, None]).split(own.shape[0]))
    total = torch.zeros_like(own)
    for partial in [*others[:rank], own, *others[rank:]]:
        total += partial
    return total.to(dtype)


def combine_rows(back: Tensor, rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """out[m] = sum of the rows of token m, in float32 and in the order of its slots; NaN where one found no room.

    Args:
        back: [N, H], what came back for each row that was sent; or uint8, as from `halve_rows`.
        rows: int32 [M, top_k], as from `place_rows`.
        hidden_size: H.
        dtype: of the result.

    Returns:
        [M, H] in `dtype`.
    """
    if back.dtype == torch.uint8:
        values, scale = read_halves(back, hidden_size)
        back = values.float() * scale[:, None]
    total = back.new_zeros((rows.shape[0], hidden_size), dtype=torch.float32)
    for slot in range(rows.shape[1]):
        row = rows[:, slot].long()
        token = (row >= 0).nonzero().flatten()
        total[token] += back[row[token]].float()
        total[row == NO_ROOM] = torch.nan
    return total.to(dtype)


def scales_of(hidden_size: int, grouped: bool) -> int:
    """float32 scales of a quantised row."""
    return -(-hidden_size // GROUP) if grouped else 1
