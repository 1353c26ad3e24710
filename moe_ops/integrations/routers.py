"""Routers of transformers' MoE blocks through `moe_ops.topk_route`."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_ops.api import topk_route
from moe_ops.env import LOGGER
from moe_ops.integrations.translate import NAME, name_of, options_of

# Classes by what their forward computes. Those that return something else than (logits, weights, ids), and those that
# take the bias as an argument, are not here.
_SOFTMAX = """flex_olmo.FlexOlmo mellum.Mellum olmoe.Olmoe qwen2_moe.Qwen2Moe qwen3_moe.Qwen3Moe qwen3_next.Qwen3Next
    qwen3_omni_moe.Qwen3OmniMoeThinkerText qwen3_omni_moe.Qwen3OmniMoeTalkerText qwen4_exp.Qwen4ExpText"""
_RENORMALISED = """minimax.MiniMax mixtral.Mixtral qwen3_5_moe.Qwen3_5Moe qwen3_omni_moe.Qwen3OmniMoeText
    qwen3_vl_moe.Qwen3VLMoeText"""
_SIGMOID_GROUPS = """axk1.AXK1 bailing_hybrid.BailingHybrid deepseek_v3.DeepseekV3 deepseek_v32.DeepseekV32 dots1.Dots1
    dots3_note.Dots3NoteText exaone_moe.ExaoneMoe glm4_moe.Glm4Moe glm4_moe_lite.Glm4MoeLite glm4v_moe.Glm4vMoeText
    glm5_next.Glm5NextText glm_moe_dsa.GlmMoeDsa hy_v4.HYV4 hy_v4_vl.HYV4VL kimi_linear.KimiLinear
    mimo_v2_flash.MiMoV2Flash nemotron_h.NemotronH solar_open.SolarOpen"""
_SOFTMAX_GROUPS = "deepseek_ocr2.DeepseekOcr2Text deepseek_v2.DeepseekV2 unlimited_ocr.UnlimitedOcrText"


def _classes(names: str, ending: str) -> Iterator[str]:
    for package, cls in (name.split(".") for name in names.split()):
        yield f"transformers.models.{package}.modeling_{package}.{cls}{ending}"


_KINDS = {
    **dict.fromkeys(_classes(_SOFTMAX, "TopKRouter"), "softmax"),
    **dict.fromkeys(_classes(_RENORMALISED, "TopKRouter"), "renormalised"),
    **dict.fromkeys(_classes(_SIGMOID_GROUPS, "TopkRouter"), "sigmoid groups"),
    **dict.fromkeys(_classes(_SOFTMAX_GROUPS, "TopkRouter"), "softmax groups"),
    **dict.fromkeys(_classes("gpt_oss.GptOss", "TopKRouter"), "topk softmax"),
}


def fuse_routers(model: nn.Module) -> list[str]:
    """Lets a model's routers choose experts by `moe_ops.topk_route`, one launch in place of up to fifteen.

    A router is taken where its class is known (docs/models.md has the families) and the experts beside it run through
    the op; the others stay as they are, and the log names them. Parameters and state dict stay the same. As soon as
    `set_experts_implementation` gives the experts to something else, a router computes what it did before.

    Fused, it returns the same logits, weights in float32 where transformers may round them to 16 bits, the largest
    first, and ids in int32; of equal scores it takes the lower expert, which torch.topk leaves open. For inference:
    there is no backward.

    Args:
        model: of transformers, or a part of one; after `register`.

    Returns:
        The names of the routers that are fused, those of an earlier call included.

    Example:
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> import moe_ops.integrations.transformers
        >>> moe_ops.integrations.transformers.register()
        >>> config = Qwen3MoeConfig(
        ...     vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        ... )
        >>> model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_ops").eval()
        >>> moe_ops.integrations.transformers.fuse_routers(model)
        ['model.layers.0.mlp.gate']
    """  # fmt: skip
    fused, others = [], set()
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not hasattr(experts, "has_gate") or not hasattr(experts, "is_transposed"):
            continue
        for child in ("gate", "router"):
            router = getattr(block, child, None)
            if not isinstance(router, nn.Module):
                continue
            if not isinstance(router, _Fused):
                if name_of(type(router)) not in _KINDS or isinstance(options_of(experts, _device(experts)), str):
                    others.add(name_of(type(router)))
                    continue
                router.__class__ = _fused_class(type(router))
                # In a tuple it is not a submodule, whose weights the state dict would have twice.
                router.experts_beside = (experts,)
            fused.append(f"{name}.{child}" if name else child)
    if others:
        LOGGER.warning("routers that stay as they are: %s", ", ".join(sorted(others)))
    return fused


def _device(module: nn.Module) -> torch.device:
    return module.down_proj.device


class _Fused:
    """What the class of a fused router has besides."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, ids) of hidden states [..., H]."""
        if self.experts_beside[0].config._experts_implementation != NAME:
            return super().forward(hidden_states, *args, **kwargs)
        dtype, bias, options = _formula(self)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight = self.weight
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        logits = functional.linear(x, weight, getattr(self, "bias", None))
        return logits, *topk_route(logits, self.top_k, bias, **options)


@functools.cache
def _fused_class(cls: type) -> type:
    # Its name stays, for what looks modules up by it.
    return type(cls.__name__, (_Fused, cls), {"__module__": cls.__module__, "router_kind": _KINDS[name_of(cls)]})


def _formula(router: nn.Module) -> tuple[torch.dtype | None, Tensor | None, dict[str, object]]:
    """The dtype of the logits (None: that of the hidden states), the bias for the choice, the options."""
    match router.router_kind:
        case "softmax":
            return None, None, {"renormalize": router.norm_topk_prob}
        case "renormalised":
            return None, None, {"renormalize": True}
        case "topk softmax":
            return None, None, {"scoring": "topk_softmax"}
        case "softmax groups":
            grouped = router.topk_method == "group_limited_greedy"
            groups = {"num_groups": router.num_group, "topk_groups": router.topk_group} if grouped else {}
            return torch.float32, None, {**groups, "routed_scaling_factor": float(router.routed_scaling_factor)}
    return (
        torch.float32,
        router.e_score_correction_bias,
        {
            "scoring": "sigmoid", "renormalize": router.norm_topk_prob, "num_groups": router.num_group,
            "topk_groups": router.topk_group, "group_score": "top2",
            "routed_scaling_factor": float(router.routed_scaling_factor),
        },
    )  # fmt: skip
