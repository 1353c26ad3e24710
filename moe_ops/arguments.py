"""The arguments of one `fused_moe_tma` call."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_ops.memory import merge_blocks


@dataclass(slots=True, eq=False)
class Arguments:
    """The arguments of one `fused_moe_tma` call, in the schema's order and with its defaults."""

    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    w1_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w1_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w1_zero_point: Tensor | None = None
    w2_zero_point: Tensor | None = None
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None
    expert_map: Tensor | None = None
    activation: str = "silu"
    activation_alpha: float | None = None
    activation_limit: float | None = None
    gate_up_layout: str = "concatenated"
    quantization: str = "none"
    block_shape: Sequence[int] | None = None
    apply_router_weight_on_input: bool = False
    routed_scaling_factor: float = 1.0
    reduce_topk: bool = True
    deterministic: bool = True
    path: str = "auto"
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.quantization == "mxfp4_w4a16" and isinstance(self.w1, Tensor) and isinstance(self.w2, Tensor):
            self.w1, self.w2 = merge_blocks(self.w1), merge_blocks(self.w2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that were given, by argument name."""
        return {name: value for name in TENSOR_ARGUMENTS if (value := getattr(self, name)) is not None}


_NAMES = tuple(field.name for field in fields(Arguments))
TENSOR_ARGUMENTS = _NAMES[: _NAMES.index("activation")]
REQUIRED_TENSORS = TENSOR_ARGUMENTS[:5]
OPTION_ARGUMENTS = _NAMES[len(TENSOR_ARGUMENTS) :]
