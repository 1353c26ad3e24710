"""Launches of expert parallelism: the rows of every rank, what they hold, and the sum of what comes back."""

from collections.abc import Hashable

import torch
from torch import Tensor

from moe_ops.backends.launch import cdiv, facts_of, launcher_of, next_power_of_2, on_device
from moe_ops.backends.quantize import LARGEST
from moe_ops.backends.routing import sort_routes
from moe_ops.exchange import RowLayout, half_bytes, read_halves
from moe_ops.kernels import exchange as kernels
from moe_ops.quantization.scheme import GROUP

_TOKENS, _ROUTES = 16, 128
_COLUMNS = 2048
_UNROLL = 4


def _facts_of(tensor: Tensor | None) -> Hashable:
    """As `facts_of`, and the sizes, which are constants of these kernels."""
    return tensor if tensor is None else (tensor.shape, facts_of(tensor))


def place_rows(
    topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `moe_ops.exchange.place_rows`, without a host sync."""
    ids = topk_ids.contiguous()
    num_tokens, top_k = ids.shape
    ranks, local, first = (ids.new_empty(ids.shape, dtype=torch.int32) for _ in range(3))
    counts = ids.new_zeros((num_ranks,), dtype=torch.int32)
    if num_tokens == 0:
        return ranks, local, first, counts
    launch = launcher_of("place", _facts_of(ids), num_ranks)
    sizes = {"NUM_RANKS": num_ranks, "RANKS_POW2": next_power_of_2(num_ranks + 1)}
    with on_device(ids):
        launch(
            "first", kernels.first_slots_kernel, cdiv(num_tokens, _TOKENS),
            (ids, rank_of, local_of, ranks, local, first, counts, num_tokens, rank_of.shape[0]),
            lambda: {"TOP_K": top_k, "TOKENS": _TOKENS, "TOP_K_POW2": next_power_of_2(top_k), **sizes},
        )  # fmt: skip
        # The stable sort that puts routes in the order of their experts puts rows in the order of their ranks.
        rows = sort_routes(first, num_ranks, 1, launch=launch).inverse
        if capacity:
            launch(
                "spread", kernels.spread_kernel, cdiv(rows.numel(), _ROUTES),
                (rows, first, counts, rows.numel(), capacity), lambda: {**sizes, "ROUTES": _ROUTES},
            )  # fmt: skip
    return ranks, local, rows.view(num_tokens, top_k), counts


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
    """As `moe_ops.exchange.pack_rows`, in one launch."""
    (num_tokens, hidden), top_k = hidden_states.shape, experts.shape[1]
    layout = RowLayout(hidden, top_k, dtype, scales)
    payload = hidden_states.new_empty((num_rows, layout.row_bytes), dtype=torch.uint8)
    programs = max(num_tokens, num_rows if capacity or rows is None else 0)
    if programs == 0:
        return payload
    topk_weights, experts = topk_weights.contiguous(), experts.contiguous()
    num_ranks = 1 if counts is None else counts.shape[0]
    tensors = (hidden_states, scale, topk_weights, experts)
    launch = launcher_of("pack", *map(_facts_of, tensors), dtype, scales, ranks is None, rows is None, counts is None,
                       num_ranks)  # fmt: skip
    with on_device(hidden_states):
        launch(
            "pack", kernels.pack_kernel, programs,
            (hidden_states, scale, topk_weights, experts, ranks, rows, counts,
             payload.view(dtype), payload.view(torch.int32), num_tokens, num_rows, num_experts, capacity, hidden,
             *hidden_states.stride(), *((0, 0) if scale is None else scale.stride()),
             layout.row_bytes // dtype.itemsize, layout.row_bytes // 4, layout.scale_offset // 4,
             layout.expert_offset // 4, layout.weight_offset // 4, layout.lost_offset // 4),
            lambda: {
                **_pack_tile(hidden, scales, scale is not None), "TOP_K": top_k,
                "TOP_K_POW2": next_power_of_2(top_k), "SLOTS": 1 if rows is None else top_k,
                "SCALES": scales, "GIVEN": scale is not None, "LARGEST": LARGEST.get(dtype, 1.0),
                "NUM_RANKS": num_ranks, "RANKS_POW2": next_power_of_2(num_ranks + 1),
            },
        )  # fmt: skip
    return payload


def _pack_tile(hidden: int, scales: int, given: bool) -> dict[str, int]:
    """Columns that a program of the pack kernel takes at once."""
    # One scale for all columns needs them at once.
    width = next_power_of_2(hidden) if scales == 1 and not given else GROUP
    units = max(1, min(_COLUMNS, next_power_of_2(hidden)) // width)
    return {"WIDTH": width, "UNITS": units, "num_warps": min(16, max(4, width * units // 512))}


def halve_rows(partial: Tensor, first: int, count: int) -> Tensor:
    """As `moe_ops.exchange.halve_rows`, in one launch."""
    num_rows, hidden = partial.shape[0] - count, partial.shape[1]
    payload = partial.new_empty((num_rows, half_bytes(hidden)), dtype=torch.uint8)
    if num_rows == 0:
        return payload
    values, scale = read_halves(payload, hidden)
    block_h = next_power_of_2(hidden)
    launch = launcher_of("halve", hidden, facts_of(partial))
    with on_device(partial):
        launch(
            "halve", kernels.halve_kernel, num_rows,
            (partial, values, scale, first, count, hidden, partial.stride(0), values.stride(0), scale.stride(0)),
            lambda: {"BLOCK_H": block_h, "num_warps": min(16, max(4, block_h // 512))},
        )  # fmt: skip
    return payload


def sum_ranks(own: Tensor, back: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """As `moe_ops.exchange.sum_ranks`, in one launch."""
    return _sum(back, None, own, back.shape[0] // max(1, own.shape[0]) + 1, rank, own.shape[1], dtype)


def combine_rows(back: Tensor, rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """As `moe_ops.exchange.combine_rows`, in one launch."""
    return _sum(back, rows, None, rows.shape[1], 0, hidden_size, dtype)


def _sum(back: Tensor, rows: Tensor | None, own: Tensor | None, slots: int, rank: int, hidden: int,
         dtype: torch.dtype) -> Tensor:  # fmt: skip
    num_tokens = (rows if own is None else own).shape[0]
    out = back.new_empty((num_tokens, hidden), dtype=dtype)
    if num_tokens == 0:
        return out
    values, scale = read_halves(back, hidden) if back.dtype == torch.uint8 else (back, None)
    block_h = min(_COLUMNS, next_power_of_2(hidden))
    launch = launcher_of("sum", facts_of(back), facts_of(rows), facts_of(own), slots, hidden, dtype)
    with on_device(back):
        launch(
            "sum", kernels.sum_kernel, num_tokens * cdiv(hidden, block_h),
            (values, scale, rows, own, out, slots, num_tokens, rank, hidden, values.stride(0),
             0 if scale is None else scale.stride(0), 0 if own is None else own.stride(0), out.stride(0)),
            lambda: {"BLOCK_H": block_h, "UNROLL": min(_UNROLL, next_power_of_2(slots))},
        )  # fmt: skip
    return out
