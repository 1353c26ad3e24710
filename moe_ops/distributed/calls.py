"""One call of `ExpertParallel.fused_moe` on its way: what is packed, what this rank's experts do, what comes out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ops.api import fused_moe
from moe_ops.distributed.formats import Formats
from moe_ops.distributed.ops import ep_pack
from moe_ops.exchange import read_rows

if TYPE_CHECKING:
    from moe_ops.distributed.experts import ExpertParallel

# What the call itself sees to.
_OWN = ("a1_scale", "expert_map", "reduce_topk", "out_dtype")


class Call:
    """A call, checked.

    Args:
        hidden_states: as `ExpertParallel.fused_moe`.
        w1: likewise.
        w2: likewise.
        topk_weights: likewise.
        topk_ids: likewise.
        formats: how numbers travel.
        ep: whose call it is.
        arguments: the others.
    """

    def __init__(self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, *,
                 formats: Formats, ep: "ExpertParallel", arguments: dict[str, Any]) -> None:  # fmt: skip
        self.hidden_states, self.w1, self.w2 = hidden_states, w1, w2
        self.topk_weights, self.topk_ids = topk_weights, topk_ids
        self.formats, self.ep = formats, ep
        self.a1_scale: Tensor | None = arguments.get("a1_scale")
        self.arguments = {name: value for name, value in arguments.items() if name not in _OWN}

    @property
    def num_tokens(self) -> int:
        """M of this rank."""
        return self.hidden_states.shape[0]

    def empty(self) -> Tensor:
        """The result of no tokens."""
        return self.hidden_states.new_empty(self.hidden_states.shape, dtype=self.formats.out_dtype)

    def pack(self, placed: Sequence[Tensor] | None, num_rows: int, capacity: int) -> Tensor:
        """The rows to send, as bytes: for each rank as `placed` by `ep_place`, or every token once."""
        layout, scale = self.formats.layout, None
        if self.formats.given and self.a1_scale is not None:
            scale = self.a1_scale.view(-1, 1) if self.a1_scale.ndim == 1 else self.a1_scale
            scale = scale.expand(self.num_tokens, layout.scales)
        experts, ranks, rows, counts, bound = self.topk_ids, None, None, None, self.ep.num_experts
        if placed is not None:
            ranks, experts, rows, counts = placed
        return ep_pack(
            self.hidden_states, scale, self.topk_weights, experts, ranks, rows, counts if capacity else None, num_rows,
            bound, capacity, layout.dtype, layout.scales,
        )  # fmt: skip

    def halved(self, num_tokens: int) -> bool:
        """Whether partial sums are rounded to 16 bits for the way back, the rank with most having so many tokens."""
        formats = self.formats
        return self.ep.combined_in(formats, num_tokens) == torch.float16 != formats.partial_dtype

    def experts_on(self, payload: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """Partial sums of the rows that arrived, in the dtype they travel back in."""
        rows = read_rows(payload, self.formats.layout)
        scale = rows.scale if self.formats.quantized else self.a1_scale
        return self.experts_of(
            rows.hidden_states, scale, rows.topk_weights, rows.topk_ids, expert_map, self.formats.partial_dtype
        )

    def experts_of(
        self,
        hidden_states: Tensor,
        a1_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """This rank's experts on rows that are here."""
        if not self.ep.local_experts:
            return hidden_states.new_zeros(hidden_states.shape, dtype=out_dtype)
        return fused_moe(
            hidden_states, self.w1, self.w2, topk_weights, topk_ids, a1_scale=a1_scale, expert_map=expert_map,
            out_dtype=out_dtype, **self.arguments,
        )  # fmt: skip


class _NoBackward(torch.autograd.Function):
    """The identity; its backward raises when it runs, and not while a forward is traced."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *needing: Tensor) -> Tensor:
        ctx.likes = [(x.shape, x.dtype) for x in needing]
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.ops.moe_ops._no_backward(grad, *like) for like in ctx.likes)


def attach_no_backward(out: Tensor, needing: Sequence[Tensor]) -> Tensor:
    """The result, whose backward raises NotImplementedError as that of the op does."""
    return _NoBackward.apply(out, *needing)
