"""The ways of a call across ranks: what each sends, in which order, and where the host waits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.distributed.calls import Call
from moe_ops.distributed.ops import ep_combine, ep_halve, ep_place, ep_sum
from moe_ops.exchange import read_rows

_ANNOUNCE = "the all-to-all of the sizes"
_OUT, _BACK = "the all-to-all of the tokens", "the all-to-all of the partial sums"


class Room(NamedTuple):
    """What is known of sizes without asking other ranks.

    Attributes:
        max_tokens: the largest M of any rank.
        capacity: rows that a rank can send to another in an all-to-all.
    """

    max_tokens: int
    capacity: int


def gather(call: Call, max_tokens: int) -> Tensor:
    """All-gather of every rank's tokens, this rank's experts on all of them, and the sums of the partial sums.

    These are a reduce-scatter's, or in 16 bits, of which a collective cannot make sums, an all-to-all's.

    Args:
        call: the call.
        max_tokens: rows of each rank; the same on all.

    Returns:
        [M, H].
    """
    group = call.ep.group
    arrived = group.all_gather(call.pack(None, max_tokens, 0), "the all-gather of the tokens")
    partial = call.experts_on(arrived, call.ep.expert_map)
    if not call.halved(max_tokens):
        out = group.reduce_scatter(partial, "the reduce-scatter of the partial sums")
        return out[: call.num_tokens].to(call.formats.out_dtype)
    first, each = group.rank * max_tokens, [max_tokens] * group.size
    each[group.rank] = 0
    back = group.all_to_all(ep_halve(partial, first, max_tokens), each, each, _BACK)
    own = partial[first : first + max_tokens]
    return ep_sum(own, back, group.rank, call.formats.out_dtype)[: call.num_tokens]


def send_evenly(call: Call, room: Room) -> tuple[Tensor, Tensor | None]:
    """Each token to the ranks of its experts, as many rows for each pair of ranks, and the partial sums back.

    Args:
        call: the call.
        room: those rows.

    Returns:
        [M, H], NaN where a token found no room; and the rows of all ranks that found none, int64 [], or None where all
        find some.
    """
    group, size, capacity = call.ep.group, call.ep.group.size, room.capacity
    placed = ep_place(call.topk_ids, call.ep.rank_of, call.ep.local_of, size, capacity)
    even = [capacity] * size
    arrived = group.all_to_all(call.pack(placed, size * capacity, capacity), even, even, _OUT)
    lost = None
    if capacity < room.max_tokens:
        lost = read_rows(arrived, call.formats.layout).lost[::capacity].sum()
    back = group.all_to_all(_sums(call, arrived, room.max_tokens), even, even, _BACK)
    return _combine(call, back, placed[2]), lost


def send_unevenly(call: Call, way: str | None = None) -> Tensor:
    """The same with as many rows as there are: the ranks tell each other how many, and the host reads that.

    Args:
        call: the call.
        way: "alltoall" or "auto"; None: the call's.

    Returns:
        [M, H].
    """
    ep, group, way = call.ep, call.ep.group, way or call.ep.way
    size = group.size
    placed = ep_place(call.topk_ids, ep.rank_of, ep.local_of, size, 0)
    counts, ones = placed[3], [1] * size
    mine = torch.stack([counts, torch.full_like(counts, call.num_tokens)], 1)
    theirs = group.all_to_all(mine, ones, ones, _ANNOUNCE)
    read = _read_back(torch.cat([mine, theirs], 1))
    # The most rows there can be: a token goes to a rank once, and to no more ranks than it has slots.
    bound = call.num_tokens * min(size, call.topk_ids.shape[1])
    # Packed while the host waits, where it is known that it will be sent.
    payload = call.pack(placed, bound, 0) if way == "alltoall" else None
    table = read()
    most = max(row[3] for row in table)
    if most == 0:
        return call.empty()
    if way == "auto" and ep.choose(call.formats, most)[0] == "gather":
        return gather(call, most)
    if payload is None:
        payload = call.pack(placed, bound, 0)
    sent, received = [row[0] for row in table], [row[2] for row in table]
    arrived = group.all_to_all(payload[: sum(sent)], received, sent, _OUT)
    back = group.all_to_all(_sums(call, arrived, most), sent, received, _BACK)
    return _combine(call, back, placed[2])


def _sums(call: Call, arrived: Tensor, num_tokens: int) -> Tensor:
    """The partial sums of the rows that arrived, as they travel back."""
    partial = call.experts_on(arrived)
    return ep_halve(partial, 0, 0) if call.halved(num_tokens) else partial


def _combine(call: Call, back: Tensor, rows: Tensor) -> Tensor:
    return ep_combine(back, rows, call.formats.layout.hidden_size, call.formats.out_dtype)


def largest(call: Call) -> int:
    """The largest M of all ranks; a host sync."""
    mine = torch.full((1,), call.num_tokens, dtype=torch.int32, device=call.ep.group.device)
    return max(call.ep.group.all_gather(mine, "the all-gather of the sizes").tolist())


def _read_back(table: Tensor) -> Callable[[], list[list[int]]]:
    """Starts to copy a tensor to the host; what is returned waits for that, and for nothing launched after it."""
    if table.device.type != "cuda":
        return table.tolist
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    host.copy_(table, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[list[int]]:
        copied.synchronize()
        return host.tolist()

    return read
