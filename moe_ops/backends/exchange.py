"""Launches of expert parallelism: the rows of every rank, what they hold, and the sum of what comes back."""

from collections.abc import Hashable

import torch
import triton
from torch import Tensor

from moe_ops.backends.launch import Launcher, on_device
from moe_ops.backends.quantize import LARGEST
from moe_ops.exchange import RowLayout
from moe_ops.kernels import exchange as kernels
from moe_ops.kernels.route import scan_kernel
from moe_ops.quantization.scheme import GROUP

_ROUTES, _SCAN_STEP = 128, 1024
_COLUMNS = 2048
_UNROLL = 4
# Kernels compiled for calls seen before, by everything that they are specialised on; what a model repeats is few.
_MAX_ENTRIES = 4096
_kept: dict[Hashable, dict] = {}


def _launcher(*facts: Hashable) -> Launcher:
    """Of calls alike in the given facts: `facts_of` their tensors and whatever else is a constant of the kernels."""
    if facts not in _kept and len(_kept) >= _MAX_ENTRIES:
        _kept.clear()
    return Launcher(_kept.setdefault(facts, {}))


def _facts_of(tensor: Tensor | None) -> Hashable:
    """What a kernel is specialised on of a tensor; nothing of one that is not there."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def place_rows(
    topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `moe_ops.exchange.place_rows`, without a host sync."""
    ids = topk_ids.contiguous()
    num_tokens, top_k = ids.shape
    ranks, local, first, rows = ids.new_empty((4, num_tokens, top_k), dtype=torch.int32)
    if num_tokens == 0:
        return ranks, local, rows, ids.new_zeros((num_ranks,), dtype=torch.int32)
    top_k_pow2 = triton.next_power_of_2(top_k)
    tokens = max(1, _ROUTES // top_k_pow2)
    num_chunks = triton.cdiv(num_tokens, tokens)
    counts = ids.new_empty((num_ranks,), dtype=torch.int32)
    chunk_counts = ids.new_empty((num_ranks, num_chunks), dtype=torch.int32)
    launch = _launcher("place", _facts_of(ids), num_ranks)
    sizes = {"NUM_RANKS": num_ranks, "RANKS_POW2": triton.next_power_of_2(num_ranks + 1), "num_warps": 4}
    with on_device(ids):
        launch(
            "first", kernels.first_slots_kernel, num_chunks,
            (ids, rank_of, local_of, ranks, local, first, rows, chunk_counts, num_tokens, rank_of.shape[0], num_chunks),
            lambda: {"TOP_K": top_k, "TOKENS": tokens, "TOP_K_POW2": top_k_pow2, **sizes},
        )  # fmt: skip
        launch(
            "scan", scan_kernel, num_ranks, (chunk_counts, counts, num_chunks),
            lambda: {"STEP": _SCAN_STEP, "PDL": False, "num_warps": 4},
        )  # fmt: skip
        launch(
            "rows", kernels.rows_kernel, num_chunks,
            (rows, first, chunk_counts, counts, rows.numel(), num_chunks, capacity),
            lambda: {"CHUNK": tokens * top_k, "ROUTES": tokens * top_k_pow2, **sizes},
        )  # fmt: skip
    return ranks, local, rows, counts


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
    launch = _launcher("pack", *map(_facts_of, tensors), dtype, scales, ranks is None, rows is None, counts is None,
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
                "TOP_K_POW2": triton.next_power_of_2(top_k), "SLOTS": 1 if rows is None else top_k,
                "SCALES": scales, "GIVEN": scale is not None, "LARGEST": LARGEST.get(dtype, 1.0),
                "NUM_RANKS": num_ranks, "RANKS_POW2": triton.next_power_of_2(num_ranks + 1),
            },
        )  # fmt: skip
    return payload


def _pack_tile(hidden: int, scales: int, given: bool) -> dict[str, int]:
    """Columns that a program of the pack kernel takes at once."""
    # One scale for all columns needs them at once.
    width = triton.next_power_of_2(hidden) if scales == 1 and not given else GROUP
    units = max(1, min(_COLUMNS, triton.next_power_of_2(hidden)) // width)
    return {"WIDTH": width, "UNITS": units, "num_warps": min(16, max(4, width * units // 512))}


def combine_rows(back: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """As `moe_ops.exchange.combine_rows`, in one launch."""
    (num_tokens, top_k), hidden = rows.shape, back.shape[1]
    out = back.new_empty((num_tokens, hidden), dtype=dtype)
    if num_tokens == 0:
        return out
    block_h = min(_COLUMNS, triton.next_power_of_2(hidden))
    launch = _launcher("combine", _facts_of(back), _facts_of(rows), dtype)
    with on_device(back):
        launch(
            "combine", kernels.sum_kernel, num_tokens * triton.cdiv(hidden, block_h),
            (back, rows, out, top_k, hidden, back.stride(0), out.stride(0)),
            lambda: {"BLOCK_H": block_h, "UNROLL": min(_UNROLL, triton.next_power_of_2(top_k))},
        )  # fmt: skip
    return out
