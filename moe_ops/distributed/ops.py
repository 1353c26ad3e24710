"""The steps around the collectives as ops, so that a compiled model and a graph hold them: `moe_ops::ep_*`.

On the CPU they are `moe_ops.exchange`, on CUDA the kernels of `moe_ops.backends.exchange`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops import exchange
from moe_ops.exchange import RowLayout, half_bytes
from moe_ops.schema import NAMESPACE

_PLACE = (
    "ep_place(Tensor topk_ids, Tensor rank_of, Tensor local_of, int num_ranks, SymInt capacity) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_PACK = (
    "ep_pack(Tensor hidden_states, Tensor? scale, Tensor topk_weights, Tensor experts, Tensor? ranks, Tensor? rows, "
    "Tensor? counts, SymInt num_rows, int num_experts, SymInt capacity, ScalarType dtype, int scales) -> Tensor"
)
_HALVE = "ep_halve(Tensor partial, SymInt first, SymInt count) -> Tensor"
_SUM = "ep_sum(Tensor own, Tensor back, int rank, ScalarType dtype) -> Tensor"
_COMBINE = "ep_combine(Tensor back, Tensor rows, SymInt hidden_size, ScalarType dtype) -> Tensor"

# Kept alive here: the ops vanish with the object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _place_fake(topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, capacity: int
                ) -> tuple[Tensor, ...]:  # fmt: skip
    like = topk_ids.new_empty
    shape = topk_ids.shape
    return (*(like(shape, dtype=torch.int32) for _ in range(3)), like((num_ranks,), dtype=torch.int32))


def _pack_fake(hidden_states: Tensor, scale: Tensor | None, topk_weights: Tensor, experts: Tensor,
               ranks: Tensor | None, rows: Tensor | None, counts: Tensor | None, num_rows: int, num_experts: int,
               capacity: int, dtype: torch.dtype, scales: int) -> Tensor:  # fmt: skip
    layout = RowLayout(hidden_states.shape[1], experts.shape[1], dtype, scales)
    return hidden_states.new_empty((num_rows, layout.row_bytes), dtype=torch.uint8)


def _halve_fake(partial: Tensor, first: int, count: int) -> Tensor:
    return partial.new_empty((partial.shape[0] - count, half_bytes(partial.shape[1])), dtype=torch.uint8)


def _sum_fake(own: Tensor, back: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    return own.new_empty(own.shape, dtype=dtype)


def _combine_fake(back: Tensor, rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    return back.new_empty((rows.shape[0], hidden_size), dtype=dtype)


def _on_cuda(name: str) -> Callable[..., object]:
    def run(*args: object) -> object:
        from moe_ops.backends import exchange as backend

        return getattr(backend, name)(*args)

    return run


for _schema, _function, _fake in (
    (_PLACE, "place_rows", _place_fake),
    (_PACK, "pack_rows", _pack_fake),
    (_HALVE, "halve_rows", _halve_fake),
    (_SUM, "sum_ranks", _sum_fake),
    (_COMBINE, "combine_rows", _combine_fake),
):
    _name = _schema.split("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(exchange, _function), "CPU")
    _library.impl(_name, _on_cuda(_function), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

ep_place = torch.ops.moe_ops.ep_place.default
ep_pack = torch.ops.moe_ops.ep_pack.default
ep_halve = torch.ops.moe_ops.ep_halve.default
ep_sum = torch.ops.moe_ops.ep_sum.default
ep_combine = torch.ops.moe_ops.ep_combine.default
