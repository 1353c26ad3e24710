"""`MoELayer`: router, experts and shared expert, from hidden states to hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_ops.activations import ACTIVATIONS
from moe_ops.api import topk_route
from moe_ops.checks import require, require_name
from moe_ops.nn.experts import FusedExperts
from moe_ops.nn.moves import keep_dtype
from moe_ops.reference import nonlinearity
from moe_ops.router import make_router

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from moe_ops.distributed import ExpertParallel

_SHARED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "silu_no_gate", "gelu_no_gate", "relu2_no_gate")


class SharedExpert(nn.Module):
    """The expert that sees every token: a dense feed-forward block.

        out = act(x @ gate_proj^T) * (x @ up_proj^T) @ down_proj^T;   without a gate: act(x @ up_proj^T) @ down_proj^T

    Args:
        hidden_size: H.
        intermediate_size: its own I.
        activation: "silu", "gelu", "gelu_tanh", "silu_no_gate", "gelu_no_gate" or "relu2_no_gate".
        bias: whether its projections have biases.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> import torch
        >>> from moe_ops.nn import SharedExpert
        >>> SharedExpert(64, 32)(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_name("activation", activation, _SHARED_ACTIVATIONS)
        self.activation = activation
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        gated = ACTIVATIONS[activation].gated
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        up, activation = self.up_proj(hidden_states), ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(nonlinearity(up, activation, None))
        return self.down_proj(nonlinearity(self.gate_proj(hidden_states), activation, None) * up)

    def extra_repr(self) -> str:
        """The activation."""
        return self.activation


class MoELayer(nn.Module):
    """A Mixture-of-Experts layer: router, `topk_route`, `FusedExperts`, and a shared expert where asked for.

        weights, ids = topk_route(router(x), top_k, correction_bias, ...)
        out = experts(x, weights, ids) + shared_expert(x) * sigmoid(shared_expert_gate(x))

    without the second term, or its gate, where there is none. In the state dict: `router.weight` [E, H] (and
    `router.bias`), `correction_bias` [E] in float32, `experts.*` of `FusedExperts`, `shared_expert.{gate,up,down}_proj`
    and `shared_expert_gate.weight` [1, H]. `convert_hf_state_dict` makes one of a transformers MoE block's.

    For inference: neither the router nor the experts have a backward. In train mode a forward works, and a backward
    raises NotImplementedError.

    Args:
        hidden_size: H.
        intermediate_size: I of the experts.
        num_experts: E.
        top_k: experts of a token.
        scoring: as `moe_ops.topk_route`.
        renormalize: as `moe_ops.topk_route`.
        num_groups: as `moe_ops.topk_route`.
        topk_groups: as `moe_ops.topk_route`.
        group_score: as `moe_ops.topk_route`.
        routed_scaling_factor: as `moe_ops.topk_route`; the shared expert is not scaled.
        correction_bias: with a bias [E] that only chooses, zeros at first.
        router_bias: the router has a bias.
        router_dtype: the logits are computed in this dtype; None: in that of the hidden states.
        shared_intermediate_size: I of the shared expert; None: there is none.
        shared_gate: the shared expert is weighted by the sigmoid of a Linear.
        ep_group: as `FusedExperts`: the experts are spread over these ranks, and everything else is on all of them.
        device: of the tensors.
        dtype: of the parameters.
        **experts: options of `FusedExperts`: activation, bias, quantization, block_shape, path, ...

    Raises:
        ValueError: a size, name or combination of options is wrong.

    Example:
        >>> import torch
        >>> from moe_ops.nn import MoELayer
        >>> layer = MoELayer(64, 32, num_experts=8, top_k=2, renormalize=True, shared_intermediate_size=48)
        >>> with torch.no_grad():
        ...     layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        routed_scaling_factor: float = 1.0,
        correction_bias: bool = False,
        router_bias: bool = False,
        router_dtype: torch.dtype | None = None,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        ep_group: "ProcessGroup | DeviceMesh | ExpertParallel | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **experts: Any,
    ) -> None:
        super().__init__()
        if shared_gate and shared_intermediate_size is None:
            raise ValueError(
                "shared_gate is True, but there is no shared expert; pass shared_intermediate_size, or leave it out"
            )
        self.top_k, self.router_dtype = top_k, router_dtype
        self.routing: dict[str, Any] = {
            "scoring": scoring,
            "renormalize": renormalize,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_score": group_score,
            "routed_scaling_factor": routed_scaling_factor,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = FusedExperts(
            num_experts, hidden_size, intermediate_size, ep_group=ep_group, **experts, **factory
        )
        # What is wrong with the routing shows here, and not at the first token.
        make_router(torch.empty(0, num_experts, device="meta"), top_k, **self.routing)
        self.router = nn.Linear(hidden_size, num_experts, bias=router_bias, **factory)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if correction_bias else None
        self.register_buffer("correction_bias", bias)
        self.shared_expert = self.shared_expert_gate = None
        if shared_intermediate_size is not None:
            activation = self.experts.activation
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, activation=activation, **factory)
        if shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Runs the layer.

        Args:
            hidden_states: [..., H], the dtype of the parameters.

        Returns:
            [..., H], the dtype of `hidden_states`.

        Raises:
            ValueError, TypeError: H is another one, or as `moe_ops.topk_route` and `moe_ops.fused_moe`.
        """
        hidden_size = self.router.weight.shape[1]
        require(
            hidden_states.shape[-1] == hidden_size,
            lambda: (
                f"hidden_states has shape {list(hidden_states.shape)}, expected [..., {hidden_size}]: the hidden_size "
                "of this layer"
            ),
        )
        x = hidden_states.reshape(-1, hidden_size)
        out = self.experts(x, *self.route(x))
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            out = out + (
                shared if self.shared_expert_gate is None else shared * torch.sigmoid(self.shared_expert_gate(x))
            )
        return out.view(hidden_states.shape)

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [M, top_k] in fp32 and experts [M, top_k] in int32 of hidden states [M, H]."""
        dtype = self.router_dtype or hidden_states.dtype
        bias = None if self.router.bias is None else self.router.bias.to(dtype)
        logits = functional.linear(hidden_states.to(dtype), self.router.weight.to(dtype), bias)
        return topk_route(logits, self.top_k, self.correction_bias, **self.routing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoELayer":
        # In 16 bits the bias would choose other experts.
        return super()._apply(keep_dtype(fn, [self.correction_bias]), recurse)

    def extra_repr(self) -> str:
        """top_k, and the options of the router that are not the defaults."""
        defaults = {"renormalize": False, "num_groups": 1, "topk_groups": 1, "group_score": "max"}
        defaults["routed_scaling_factor"] = 1.0
        told = (f"{name}={value}" for name, value in self.routing.items() if defaults.get(name) != value)
        return ", ".join((f"top_k={self.top_k}", *told))
