"""`ExpertParallel`: the op across a process group, each rank with some of the experts and tokens of its own."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ops import plans
from moe_ops.arguments import Arguments
from moe_ops.checks import require, require_name
from moe_ops.distributed.agreement import check_agreement
from moe_ops.distributed.calls import Call, attach_no_backward
from moe_ops.distributed.cost import WAYS, Network, choose_way, halving_pays
from moe_ops.distributed.explain import explain
from moe_ops.distributed.formats import PAYLOADS, Formats, make_formats
from moe_ops.distributed.groups import Group, resolve_group
from moe_ops.distributed.placement import Placement
from moe_ops.distributed.plan import DistributedPlan
from moe_ops.distributed.state import OF_EXPERTS
from moe_ops.distributed.ways import Room, gather, largest, send_evenly, send_unevenly
from moe_ops.quantization.scheme import COMPUTE_DTYPES

_OVERFLOWS = ("fallback", "error")


class CapacityError(RuntimeError):
    """Tokens had no room in the `capacity` of an all-to-all; their results are NaN."""


class ExpertParallel:
    """The op across a process group: every rank has some of the experts, and tokens of its own.

        out[m] = routed_scaling_factor * sum_k topk_weights[m, k] * expert(topk_ids[m, k])(x[m]),   ids 0 .. E - 1

    as `moe_ops.fused_moe` with the weights of all experts would give it. Every rank calls it, at the same time and
    with the same options; M may differ, and be 0. A rank sums its experts' routes of a token in float32; these partial
    sums, rounded to `combine_dtype`, are summed in float32 and rounded to the result. With torch.float32 nothing is
    rounded that one device would not round. docs/distributed.md has the two ways, what they send, the roundings, and
    what CUDA graphs and torch.compile take.

    Args:
        group: the ranks: a ProcessGroup, a DeviceMesh of one dimension (`mesh["ep"]` of a larger one), or None for all
            processes.
        num_experts: E of all ranks, divided evenly; or None with a `placement`.
        placement: which rank has which experts.
        way: "gather" (all-gather of tokens, reduce-scatter of partial sums: few tokens), "alltoall" (each token to the
            ranks of its experts, once: many tokens), or "auto": by the estimated time of `choose_way`.
        max_tokens: the largest M of any rank and call; the same on all ranks. With it nothing is read back to the
            host; None: the ranks tell each other their M in each call, which costs a host sync.
        capacity: rows that a rank can send to another in an all-to-all without a host sync; None: `max_tokens`, which
            always is enough.
        on_overflow: what happens when a `capacity` below `max_tokens` is not enough. "fallback": after the call was
            launched a flag is read back, and on every rank it runs again with uneven splits. "error": nothing is read
            back; results of tokens without room are NaN, and `raise_on_overflow` raises on every rank.
        payload: how hidden states travel: "quantized" (8 bits and scales; formats "w8a8"), "plain" (as they are), or
            "auto": quantised where the op would quantise them anyway, which rounds nothing more.
        combine_dtype: of partial sums on their way back. torch.float32: as they are. torch.float16: half the bytes,
            rounded to 11 bits; a power of two for each row keeps it from overflowing (not where the experts compute in
            float16). torch.bfloat16: half the bytes, rounded to 8 bits, which is a rounding as large as the result's.
            None: float32, or where the experts compute in bfloat16, float16 if that is estimated to be faster.
        network: how fast the ranks reach each other, for "auto".
        check: compare the ranks' arguments before each call, and raise on all ranks where they differ or one is
            wrong; costs host syncs.
        device: of the tensors; None: the current CUDA device for a group with NCCL, else the CPU.

    Attributes:
        group: the ranks, and which this one is.
        placement: which rank has which experts.
        overflow: int64 [1] on the device: rows that found no room since the last `raise_on_overflow`, of all ranks.

    Raises:
        ValueError: an option is wrong, or two do not go together.
        TypeError: a dtype or a group is something else.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from moe_ops.distributed import ExpertParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ep = ExpertParallel(None, num_experts=4)
        >>> x, ids = torch.randn(3, 16), torch.tensor([[0], [3], [7]])
        >>> ep.fused_moe(x, torch.randn(4, 16, 16), torch.randn(4, 16, 8), torch.ones(3, 1), ids).shape
        torch.Size([3, 16])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Group | None,
        num_experts: int | None = None,
        *,
        placement: Placement | None = None,
        way: str = "auto",
        max_tokens: int | None = None,
        capacity: int | None = None,
        on_overflow: str = "fallback",
        payload: str = "auto",
        combine_dtype: torch.dtype | None = None,
        network: Network | None = None,
        check: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.group = group if isinstance(group, Group) else resolve_group(group, device)
        require_name("way", way, ("auto", *WAYS))
        require_name("on_overflow", on_overflow, _OVERFLOWS)
        require_name("payload", payload, PAYLOADS)
        if combine_dtype is not None and combine_dtype not in COMPUTE_DTYPES:
            raise TypeError(f"combine_dtype is {combine_dtype}, expected one of {COMPUTE_DTYPES} or None")
        for name, value in (("max_tokens", max_tokens), ("capacity", capacity)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, or None")
        if capacity is not None and max_tokens is None:
            raise ValueError(
                f"capacity is {capacity}, but max_tokens is None, and without it splits are uneven and always fit; "
                "pass max_tokens, or leave capacity out"
            )
        if capacity is not None and way == "gather":
            raise ValueError(f"capacity is {capacity}, but way='gather' has none; leave it out, or pass way='alltoall'")
        self.placement = self._placement(num_experts, placement)
        self.way, self.on_overflow, self.room = way, on_overflow, None
        if max_tokens is not None:
            self.room = Room(max_tokens, max_tokens if capacity is None else min(capacity, max_tokens))
        self.payload, self.combine_dtype, self.check = payload, combine_dtype, check
        self.network = network or Network()
        options: dict[str, Any] = {"dtype": torch.int32, "device": self.group.device}
        self.rank_of = torch.tensor(self.placement.rank_of, **options)
        self.local_of = torch.tensor(self.placement.local_of, **options)
        self.expert_map = torch.tensor(self.placement.expert_map(self.group.rank), **options)
        self.overflow = torch.zeros(1, dtype=torch.int64, device=self.group.device)

    def _placement(self, num_experts: int | None, placement: Placement | None) -> Placement:
        if placement is None:
            if num_experts is None:
                raise ValueError("num_experts and placement are None, expected one of them")
            return Placement.even(num_experts, self.group.size)
        if placement.num_ranks != self.group.size:
            raise ValueError(
                f"placement is for {placement.num_ranks} ranks, and the group has {self.group.size}; pass one for them"
            )
        if num_experts not in (None, placement.num_experts):
            raise ValueError(
                f"num_experts is {num_experts}, but placement has {placement.num_experts} experts; leave one out"
            )
        return placement

    @property
    def max_tokens(self) -> int | None:
        """The largest M of any rank and call, where it is known."""
        return self.room and self.room.max_tokens

    @property
    def capacity(self) -> int | None:
        """Rows that a rank can send to another without a host sync."""
        return self.room and self.room.capacity

    @property
    def num_experts(self) -> int:
        """E, of all ranks."""
        return self.placement.num_experts

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its weights."""
        return self.placement.experts[self.group.rank]

    def fused_moe(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, **arguments: Any
    ) -> Tensor:
        """Runs the experts of all ranks on the tokens of this one.

        Args:
            hidden_states: [M, H], as `moe_ops.fused_moe`; M of this rank's own.
            w1: of this rank's experts, in the order of `local_experts`; [0, ...] on a rank without any.
            w2: likewise.
            topk_weights: [M, top_k].
            topk_ids: [M, top_k], global experts; any other id contributes exactly 0.
            **arguments: others of `moe_ops.fused_moe`, of this rank's experts and tokens. `expert_map` and
                `reduce_topk=False` are not taken.

        Returns:
            [M, H], in the dtype that `moe_ops.fused_moe` has.

        Raises:
            ValueError, TypeError: as `moe_ops.fused_moe`, before anything is sent; other ranks then wait until the
                group's timeout, or with `check=True` raise too. Or M is above `max_tokens`.
            RuntimeError: a collective failed.
        """
        self._check_traced()
        check = self._checked_on_all if self.check else self._checked
        formats = check(hidden_states, w1, w2, topk_weights, topk_ids, arguments)
        tensors = (hidden_states, w1, w2, topk_weights, *(v for v in arguments.values() if isinstance(v, Tensor)))
        needing = [x for x in tensors if x.requires_grad] if torch.is_grad_enabled() else []
        with torch.no_grad():
            call = Call(hidden_states, w1, w2, topk_weights, topk_ids, formats=formats, ep=self, arguments=arguments)
            if torch.compiler.is_compiling():
                out = self._run(call)
            else:
                # Above that torch has Python functions for every collective, and the op has some of its own.
                with torch._C._AutoDispatchBelowAutograd():
                    out = self._run(call)
        return attach_no_backward(out, needing) if needing else out

    def _run(self, call: Call) -> Tensor:
        if self.group.size == 1:
            return call.experts_of(call.hidden_states, call.a1_scale, call.topk_weights, call.topk_ids, self.expert_map,
                                   call.formats.out_dtype)  # fmt: skip
        room = self.room
        if room is None:
            if self.way == "gather":
                most = largest(call)
                return gather(call, most) if most else call.empty()
            return send_unevenly(call)
        if self.choose(call.formats, room.max_tokens)[0] == "gather":
            return gather(call, room.max_tokens)
        out, lost = send_evenly(call, room)
        if lost is None:
            return out
        if self.on_overflow == "error":
            self.overflow += lost
            return out
        # Every rank reads the same sum, so that all of them run it again, or none.
        return send_unevenly(call, way="alltoall") if lost.item() else out

    def choose(self, formats: Formats, num_tokens: int) -> tuple[str, str]:
        """(way, reason) for so many tokens on the rank that has most; the same on every rank."""
        if self.way != "auto":
            return self.way, "asked for"
        best, other = choose_way(num_tokens, **self.sizes(formats, num_tokens))
        return best.way, (
            f"{best.way} takes about {best.seconds * 1e6:.0f} us for {num_tokens} tokens a rank, {other.way} "
            f"{other.seconds * 1e6:.0f}"
        )

    def combined_in(self, formats: Formats, num_tokens: int) -> torch.dtype:
        """The dtype of partial sums on their way back, for so many tokens on the rank that has most; on every rank."""
        if formats.combine_dtype is not None:
            return formats.combine_dtype
        pays = halving_pays(
            num_tokens, hidden_size=formats.layout.hidden_size, num_ranks=self.group.size, network=self.network
        )
        return torch.float16 if pays else torch.float32

    def sizes(self, formats: Formats, num_tokens: int) -> dict[str, Any]:
        """What `choose_way` has to know of a call."""
        return {
            "hidden_size": formats.layout.hidden_size, "top_k": formats.layout.top_k, "num_ranks": self.group.size,
            "row_bytes": formats.layout.row_bytes, "back_bytes": self.combined_in(formats, num_tokens).itemsize,
            "capacity": self.capacity, "network": self.network,
        }  # fmt: skip

    def raise_on_overflow(self) -> None:
        """Raises on every rank if tokens of any had no room since the last time; a host sync.

        Raises:
            CapacityError: there were such tokens; their results are NaN.
        """
        lost = int(self.overflow.item())
        self.overflow.zero_()
        if lost:
            raise CapacityError(
                f"capacity is {self.capacity}, and {lost} rows of the group's tokens found no room in it: results of "
                "their tokens are NaN; pass a larger capacity (max_tokens always is enough), or on_overflow='fallback'"
            )

    def explain(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, **arguments: Any
    ) -> DistributedPlan:
        """Says how `fused_moe` would run a call, if every rank had this one's M. Runs and sends nothing.

        Args:
            hidden_states: as `fused_moe`.
            w1: as `fused_moe`.
            w2: as `fused_moe`.
            topk_weights: as `fused_moe`.
            topk_ids: as `fused_moe`.
            **arguments: as `fused_moe`.

        Returns:
            A `DistributedPlan`; `print` it to read it.

        Raises:
            ValueError, TypeError: as `fused_moe`.
        """
        args = Arguments(hidden_states, w1, w2, topk_weights, topk_ids, **arguments)
        return explain(self, self._checked(hidden_states, w1, w2, topk_weights, topk_ids, arguments), args)

    def _checked(self, x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                 arguments: dict[str, Any]) -> Formats:  # fmt: skip
        """Everything that can be wrong on one rank, before anything is sent."""
        if arguments.get("expert_map") is not None:
            raise ValueError("expert_map was given, but the placement says where experts are; pass placement=")
        if not arguments.get("reduce_topk", True):
            raise ValueError("reduce_topk is False, but ranks send sums of routes; leave it out")
        if w1.shape[0] != len(self.local_experts):
            raise ValueError(
                f"w1 has {w1.shape[0]} experts, expected {len(self.local_experts)}, those of rank {self.group.rank}: "
                f"{self.local_experts[:8]}; moe_ops.distributed.shard_state_dict takes them out of all"
            )
        if x.device != self.group.device:
            raise ValueError(f"hidden_states is on {x.device}, expected {self.group.device}, the group's device")
        if not torch.compiler.is_compiling():  # while a call is traced, the op's fake checks it
            named = {"w1": w1, "w2": w2, **arguments, "expert_map": self.expert_map}
            if not self.local_experts:
                # The op wants an expert; one of these shapes stands for none.
                lacking = {name: named[name] for name in (*OF_EXPERTS, "a2_scale") if named.get(name) is not None}
                named |= {n: t.new_empty((1, *t.shape[1:])) for n, t in lacking.items() if t.shape[0] == 0}
            plans.plan(Arguments(hidden_states=x, topk_weights=topk_weights, topk_ids=topk_ids, **named))
        if self.room is not None:
            most = self.room.max_tokens
            require(
                x.shape[0] <= most,
                lambda: (
                    f"hidden_states has {x.shape[0]} tokens, expected at most max_tokens = {most}; pass a larger one"
                ),
            )
        return make_formats(
            x, topk_ids.shape[1], payload=self.payload, combine_dtype=self.combine_dtype,
            out_dtype=arguments.get("out_dtype"), quantization=arguments.get("quantization", "none"),
            block_shape=arguments.get("block_shape"), static_scale=arguments.get("a1_scale") is not None,
        )  # fmt: skip

    def _checked_on_all(self, x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                        arguments: dict[str, Any]) -> Formats:  # fmt: skip
        """The same, and what is wrong on one rank, or differs between two, raises on all."""
        try:
            formats = self._checked(x, w1, w2, topk_weights, topk_ids, arguments)
        except (ValueError, TypeError) as error:
            self._compare(x, w1, w2, topk_ids, arguments, error)
            raise
        self._compare(x, w1, w2, topk_ids, arguments, None)
        return formats

    def _check_traced(self) -> None:
        """Under torch.compile and while a graph is captured the host cannot wait for the device."""
        # In this order: torch.compile does not trace the second question.
        if self.group.size == 1 or not (torch.compiler.is_compiling() or self._captured()):
            return
        if self.room is None:
            raise ValueError(
                "max_tokens is None, so that sizes are read back to the host, which neither torch.compile nor a CUDA "
                "graph can do; pass max_tokens"
            )
        if self.room.capacity < self.room.max_tokens and self.on_overflow == "fallback" and self.way != "gather":
            raise ValueError(
                "on_overflow is 'fallback', which reads a flag back to the host, and neither torch.compile nor a CUDA "
                "graph can do that; pass on_overflow='error', or leave capacity out"
            )
        if self.check:
            raise ValueError(
                "check is True, which reads back to the host, and neither torch.compile nor a CUDA graph can do that; "
                "pass check=False"
            )

    def _captured(self) -> bool:
        return self.group.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _compare(self, x: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor, arguments: dict[str, Any],
                 error: Exception | None) -> None:  # fmt: skip
        facts = {
            "hidden_states": f"[M, {x.shape[-1]}] {x.dtype}",
            "w1": f"[E, {', '.join(map(str, w1.shape[1:]))}] {w1.dtype}",
            "w2": f"[E, {', '.join(map(str, w2.shape[1:]))}] {w2.dtype}",
            "topk_ids": f"[M, {topk_ids.shape[-1]}]",
            "placement": self.placement.experts,
        }
        for name, value in arguments.items():
            facts[name] = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else value
        for name in ("way", "max_tokens", "capacity", "on_overflow", "payload", "combine_dtype", "network"):
            facts[name] = getattr(self, name)
        check_agreement(self.group, facts, error)
