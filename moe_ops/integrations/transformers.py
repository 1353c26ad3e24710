"""Hugging Face transformers: `experts_implementation="moe_ops"` runs a model's experts through the op.

transformers calls a registered function instead of the forward of an experts module. Here the module is translated
into one call of `moe_ops.fused_moe`. A module is translated only if its formula is known; any other one runs
transformers' own "grouped_mm", which works with every experts module, and says so once per class on the logger
"moe_ops".
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_ops.api import explain, fused_moe
from moe_ops.dispatch import Plan
from moe_ops.env import LOGGER
from moe_ops.integrations import expert_parallel
from moe_ops.integrations.routers import fuse_routers
from moe_ops.integrations.translate import NAME, biases_of, name_of, options_of, weights_of

__all__ = ["NAME", "experts_forward", "fp8_experts_forward", "fuse_routers", "plan_of", "register"]
FALLBACK = "grouped_mm"
_FLOOR = (5, 17)
_LOGGED: set[type] = set()


def register() -> None:
    """Registers the op as the experts implementation "moe_ops" of transformers. Calling it again changes nothing.

    Afterwards `from_pretrained(..., experts_implementation="moe_ops")`, `_from_config` and
    `model.set_experts_implementation("moe_ops")` accept the name, and `generate` and `torch.compile` work. It covers
    experts whose gate is transformers' default (with SiLU, GELU or its tanh form), gpt-oss's or the clamped SiLU of
    DeepSeek-V4, and experts without a gate (SiLU, GELU or squared ReLU), in any weight layout, with or without
    biases, and experts of FP8 checkpoints with a scale for each [128, 128] (`weight_scale_inv`). Others run
    transformers' "grouped_mm" and log why. docs/models.md has the families.

    Across ranks, `DistributedConfig(ep_implementation="moe_ops")` sends tokens by
    `moe_ops.distributed.ExpertParallel`; transformers' own implementations run the op on each rank.

    Hidden states and weights must share a dtype, and there is no backward: train with "grouped_mm".

    Raises:
        ImportError: transformers is missing or older than 5.17.

    Example:
        >>> import torch
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> import moe_ops.integrations.transformers
        >>> moe_ops.integrations.transformers.register()
        >>> config = Qwen3MoeConfig(
        ...     vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        ... )
        >>> model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_ops").eval()
        >>> with torch.no_grad():
        ...     model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """  # fmt: skip
    _require_transformers()
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    # FP8 checkpoints look the same name up in an interface of their own, and a missing name is a KeyError there.
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)
    expert_parallel.register()


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, as transformers' `ExpertsInterface` calls it.

    Args:
        self: an experts module: of a class decorated with transformers' `use_experts_implementation`.
        hidden_states: [T, H], the dtype and device of the weights.
        top_k_index: experts of each token, [T, top_k], int64 or int32. `num_experts` marks an expert of another rank.
        top_k_weights: [T, top_k], any floating-point dtype.

    Returns:
        [T, H], the dtype of `hidden_states`.

    Raises:
        TypeError, ValueError: as `moe_ops.fused_moe`, for example for hidden states and weights of different dtypes.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return _forward(self, hidden_states, top_k_index, top_k_weights, ALL_EXPERTS_FUNCTIONS)


def fp8_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same for an `FP8Experts` module, as transformers' `FP8ExpertsInterface` calls it.

    Args:
        self: a module of transformers' `FP8Experts`.
        hidden_states: [T, H], bfloat16, float16 or float32.
        top_k_index: as `experts_forward`.
        top_k_weights: as `experts_forward`.

    Returns:
        [T, H], the dtype of `hidden_states`.

    Raises:
        TypeError, ValueError: as `moe_ops.fused_moe`.
    """
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    return _forward(self, hidden_states, top_k_index, top_k_weights, ALL_FP8_EXPERTS_FUNCTIONS)


def plan_of(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Plan:
    """Says how the op would run an experts module: `moe_ops.explain` for what `experts_forward` would call.

    Args:
        module: an experts module, such as `model.model.layers[0].mlp.experts`.
        hidden_states: as `experts_forward`.
        top_k_index: as `experts_forward`.
        top_k_weights: as `experts_forward`.

    Returns:
        The call's `Plan`: path, reason, tiles.

    Raises:
        ValueError: the module is not one the op can run; the message says why. Else as `moe_ops.explain`.
        TypeError: as `moe_ops.explain`.

    Example:
        >>> import torch
        >>> from transformers import Qwen3MoeConfig
        >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        >>> from moe_ops.integrations.transformers import plan_of
        >>> experts = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4))
        >>> plan_of(experts, torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)).path
        'cpu'
    """
    options = options_of(module, hidden_states.device)
    if isinstance(options, str):
        raise ValueError(f"{name_of(type(module))} runs transformers' {FALLBACK!r}, not the op: {options}")
    return explain(hidden_states, *weights_of(module), top_k_weights, top_k_index, *biases_of(module), **options)


def _forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, functions: Mapping
) -> Tensor:
    options = options_of(self, hidden_states.device)
    if isinstance(options, str):
        _log_fallback(type(self), options)
        return functions[FALLBACK](self, hidden_states, top_k_index, top_k_weights)
    return fused_moe(hidden_states, *weights_of(self), top_k_weights, top_k_index, *biases_of(self), **options)


# torch.compile cannot trace logging: marked so, this runs as it is, once, while a call is traced.
@torch.compiler.assume_constant_result
def _log_fallback(cls: type, reason: str) -> None:
    if cls not in _LOGGED:
        _LOGGED.add(cls)
        LOGGER.warning("%s runs transformers' %r instead of the op: %s", name_of(cls), FALLBACK, reason)


def _require_transformers() -> None:
    cure = "install it: pip install 'transformers>={}.{}'".format(*_FLOOR)
    try:
        import transformers
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(f"transformers is not installed; {cure}") from error
    if Version(transformers.__version__).release < _FLOOR:
        raise ImportError(f"transformers is {transformers.__version__}, too old for the op's experts interface; {cure}")
