"""What an experts module of transformers computes, as arguments of `moe_ops.fused_moe`, or why that is not known."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of the experts implementation.
NAME = "moe_ops"
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
_FP8_GATE = "transformers.integrations.finegrained_fp8.FP8Experts._apply_gate"
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
    f"{_MODELS}.hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts._apply_gate": _Formula("silu", limit="swiglu_limit"),
    f"{_MODELS}.beam.modeling_beam.BeamExperts._apply_gate": _Formula(),
    f"{_MODELS}.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _Formula("silu", limit="swiglu_limit"),
    # One class for the experts of all FP8 models: what its gate does hangs on what the configuration set.
    _FP8_GATE: _Formula(),
    f"{_FP8_GATE} with limit": _Formula(limit="limit"),
    f"{_FP8_GATE} with swiglu_alpha": _Formula("swigluoai", True, "swiglu_alpha", "swiglu_limit"),
}
_FP8_BLOCK = (128, 128)


def options_of(module: nn.Module, device: torch.device) -> dict[str, object] | str:
    """The options of the op that compute what a module does on a device, or why there are none.

    Those of a module quantised to FP8 include its scales.
    """
    if device.type not in ("cpu", "cuda", "meta"):
        return f"there are no kernels for device type {device.type!r}"
    for weight in weights_of(module):
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return "its weights are of a tensor subclass, not plain tensors"
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module):
        if act_fn._forward_hooks or act_fn._forward_pre_hooks:
            return "its act_fn has hooks, which may change what it returns"
        act_fn = type(act_fn)
    if "_apply_gate" in module.__dict__:
        return "its gate was replaced on the instance"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises the output of each expert"
    is_fp8 = hasattr(module, "down_proj_scale_inv")
    formula = _formula(type(module), module.has_gate, act_fn, _fp8_variant(module) if is_fp8 else "")
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
    if is_fp8:
        scales = _fp8_options(module)
        return scales if isinstance(scales, str) else options | scales
    return options


def _fp8_variant(module: nn.Module) -> str:
    """What a module's configuration makes of the gate that all FP8 experts share."""
    for attribute in ("gate_softcap", "swiglu_alpha", "limit"):
        if getattr(module, attribute, None) is not None:
            return f" with {attribute}"
    return ""


def _fp8_options(module: nn.Module) -> dict[str, object] | str:
    """How an FP8 module is quantised, as options of the op with the scales, or why the op has no such format."""
    if module.activation_scheme != "dynamic":
        return f"its activation_scheme is {module.activation_scheme!r}, not 'dynamic'"
    if module.block_size is None or tuple(module.block_size) != _FP8_BLOCK:
        return f"its block_size is {module.block_size}, not [128, 128]"
    scales = module.gate_up_proj_scale_inv if module.has_gate else module.up_proj_scale_inv, module.down_proj_scale_inv
    for weight, scale in zip(weights_of(module), scales, strict=True):
        if weight.dtype != torch.float8_e4m3fn:
            return f"its weights are {weight.dtype}, not torch.float8_e4m3fn"
        experts, rows, columns = weight.shape
        expected = [experts, -(-rows // _FP8_BLOCK[0]), -(-columns // _FP8_BLOCK[1])]
        # A gate and an up projection narrower than a block have a scale each, and share a block in the op.
        if list(scale.shape) != expected:
            return f"its scales are {list(scale.shape)}, not {expected}, one for each block of [128, 128]"
    # Powers of two in 8 bits are float32 numbers as well; float32 scales stay as they are.
    w1_scale, w2_scale = (scale.float() for scale in scales)
    return {"quantization": "fp8_w8a8", "block_shape": _FP8_BLOCK, "w1_scale": w1_scale, "w2_scale": w2_scale}


# torch.compile does not see a function's name: marked so, this runs as it is, once, while a call is traced.
@torch.compiler.assume_constant_result
def _formula(cls: type, has_gate: bool, act_fn: Callable | type | None, variant: str) -> _Formula | str:
    return _known_formula(cls._apply_gate if has_gate else None, act_fn, variant)


@functools.cache
def _known_formula(apply_gate: Callable | None, act_fn: Callable | type | None, variant: str = "") -> _Formula | str:
    """What a gate (None: there is none) and an activation function or its class compute, or why that is not known."""
    activation = _ACT_FNS.get(name_of(act_fn))
    unknown_act_fn = f"the op does not have its activation {name_of(act_fn)}"
    if apply_gate is None:
        return _Formula(f"{activation}_no_gate") if activation in _NOT_GATED else f"{unknown_act_fn} without a gate"
    gate = name_of(apply_gate) + variant
    # A decorated function carries the name of the one inside.
    formula = None if hasattr(apply_gate, "__wrapped__") else _GATES.get(gate)
    if formula is None:
        return f"its gate {gate} is not known"
    if formula.activation is not None:
        return formula
    if activation not in (_GATED if formula.limit is None else ("silu",)):
        return f"{unknown_act_fn} with the gate {gate}"
    return replace(formula, activation=activation)


def weights_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """w1 and w2 of the op: the module's own memory."""
    w1, w2 = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    # Views: the op reads weights of either layout.
    return (w1.transpose(1, 2), w2.transpose(1, 2)) if module.is_transposed else (w1, w2)


def biases_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """w1_bias and w2_bias of the op."""
    if not module.has_bias:
        return None, None
    return module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias


def name_of(thing: Callable | type | None) -> str:
    """Where a function or class was defined, and its name."""
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"
