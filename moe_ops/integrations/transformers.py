"""Hugging Face transformers: `experts_implementation="moe_ops"` runs a model's experts through the op.

transformers calls a registered function instead of the forward of an experts module. Here the module is translated
into one call of `moe_ops.fused_moe`. A module is translated only if its formula is known; any other one runs
transformers' own "grouped_mm", which works with every experts module, and says so once per class on the logger
"moe_ops".
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_ops.api import explain, fused_moe
from moe_ops.dispatch import Plan
from moe_ops.env import LOGGER

NAME = "moe_ops"
FALLBACK = "grouped_mm"
_FLOOR = (5, 17)
_LOGGED: set[type] = set()

# By name, so that importing this module imports neither transformers nor its models.
_ACT_FNS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
_GATED = ("silu", "gelu", "gelu_tanh")
_NOT_GATED = ("silu", "gelu", "relu2")


@dataclass(frozen=True)
class _Formula:
    """What an experts module computes; `alpha` and `limit` name its attributes that hold them."""

    activation: str | None = None  # None: what act_fn says.
    concatenated: bool = True
    alpha: str | None = None
    limit: str | None = None


_MODELS = "transformers.models"
_GATES = {
    "transformers.integrations.moe._default_apply_gate": _Formula(),
    f"{_MODELS}.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": _Formula("swigluoai", False, "alpha", "limit"),
    f"{_MODELS}.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts._apply_gate": _Formula(
        "swigluoai", True, "alpha", "limit"
    ),
    f"{_MODELS}.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": _Formula(
        "swigluoai", True, "swiglu_alpha", "swiglu_limit"
    ),
    f"{_MODELS}.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _Formula(limit="limit"),
    f"{_MODELS}.hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _Formula("silu", limit="swiglu_limit"),
    f"{_MODELS}.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _Formula("silu", limit="swiglu_limit"),
}


def register() -> None:
    """Registers the op as the experts implementation "moe_ops" of transformers. Calling it again changes nothing.

    Afterwards `from_pretrained(..., experts_implementation="moe_ops")`, `_from_config` and
    `model.set_experts_implementation("moe_ops")` accept the name, and `generate` and `torch.compile` work. It covers
    experts whose gate is transformers' default (with SiLU, GELU or its tanh form), gpt-oss's or the clamped SiLU of
    DeepSeek-V4, and experts without a gate (SiLU, GELU or squared ReLU), in any weight layout, with or without
    biases. Other experts, those quantised to FP8 included, run transformers' "grouped_mm" and log why.

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
    FP8ExpertsInterface.register(NAME, _fp8_experts_forward)


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
    options = _options(self, hidden_states)
    if isinstance(options, str):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        _log_fallback(type(self), options)
        return ALL_EXPERTS_FUNCTIONS[FALLBACK](self, hidden_states, top_k_index, top_k_weights)
    return fused_moe(hidden_states, *_weights(self), top_k_weights, top_k_index, *_biases(self), **options)


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
    options = _options(module, hidden_states)
    if isinstance(options, str):
        raise ValueError(f"{_name(type(module))} runs transformers' {FALLBACK!r}, not the op: {options}")
    return explain(hidden_states, *_weights(module), top_k_weights, top_k_index, *_biases(module), **options)


def _options(module: nn.Module, hidden_states: Tensor) -> dict[str, object] | str:
    """The options of the op that compute what the module does, or why there are none."""
    if hidden_states.device.type not in ("cpu", "cuda", "meta"):
        return f"there are no kernels for device type {hidden_states.device.type!r}"
    for weight in _weights(module):
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return "its weights are of a tensor subclass, not plain tensors"
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module):
        if act_fn._forward_hooks or act_fn._forward_pre_hooks:
            return "its act_fn has hooks, which may change what it returns"
        act_fn = type(act_fn)
    if "_apply_gate" in module.__dict__:
        return "its gate was replaced on the instance"
    formula = _formula(type(module), module.has_gate, act_fn)
    if isinstance(formula, str):
        return formula
    if module.has_gate and module.is_concatenated != formula.concatenated:
        return f"is_concatenated is {module.is_concatenated}, which is not the order of the rows that its gate reads"
    options = {"activation": formula.activation}
    if not formula.concatenated:
        options["gate_up_layout"] = "interleaved"
    for option, attribute in (("activation_alpha", formula.alpha), ("activation_limit", formula.limit)):
        if attribute is not None:
            options[option] = float(getattr(module, attribute))
    return options


# torch.compile does not see a function's name: marked so, this runs as it is, once, while a call is traced.
@torch.compiler.assume_constant_result
def _formula(cls: type, has_gate: bool, act_fn: Callable | type | None) -> _Formula | str:
    return _known_formula(cls._apply_gate if has_gate else None, act_fn)


@functools.cache
def _known_formula(apply_gate: Callable | None, act_fn: Callable | type | None) -> _Formula | str:
    """What a gate (None: there is none) and an activation function or its class compute, or why that is not known."""
    activation = _ACT_FNS.get(_name(act_fn))
    unknown_act_fn = f"the op does not have its activation {_name(act_fn)}"
    if apply_gate is None:
        return _Formula(f"{activation}_no_gate") if activation in _NOT_GATED else f"{unknown_act_fn} without a gate"
    # A decorated function carries the name of the one inside.
    formula = None if hasattr(apply_gate, "__wrapped__") else _GATES.get(_name(apply_gate))
    if formula is None:
        return f"its gate {_name(apply_gate)} is not known"
    if formula.activation is not None:
        return formula
    if activation not in (_GATED if formula.limit is None else ("silu",)):
        return f"{unknown_act_fn} with the gate {_name(apply_gate)}"
    return replace(formula, activation=activation)


def _weights(module: nn.Module) -> tuple[Tensor, Tensor]:
    w1, w2 = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    # Views: the op reads weights of either layout.
    return (w1.transpose(1, 2), w2.transpose(1, 2)) if module.is_transposed else (w1, w2)


def _biases(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not module.has_bias:
        return None, None
    return module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias


def _fp8_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    _log_fallback(type(self), "its weights are quantised to FP8")
    return ALL_FP8_EXPERTS_FUNCTIONS[FALLBACK](self, hidden_states, top_k_index, top_k_weights)


def _name(thing: Callable | type | None) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


# Nor can torch.compile trace logging.
@torch.compiler.assume_constant_result
def _log_fallback(cls: type, reason: str) -> None:
    if cls not in _LOGGED:
        _LOGGED.add(cls)
        LOGGER.warning("%s runs transformers' %r instead of the op: %s", _name(cls), FALLBACK, reason)


def _require_transformers() -> None:
    cure = "install it: pip install 'transformers>={}.{}'".format(*_FLOOR)
    try:
        import transformers
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(f"transformers is not installed; {cure}") from error
    if Version(transformers.__version__).release < _FLOOR:
        raise ImportError(f"transformers is {transformers.__version__}, too old for the op's experts interface; {cure}")
