"""State dicts of transformers' MoE blocks, as `MoELayer` has them."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMED = (
    (r"gate\.(weight|bias)", r"router.\1"),
    (r"router\.(?:linear|classifier)\.(weight|bias)", r"router.\1"),
    (r"(?:gate\.)?e_score_correction_bias", "correction_bias"),
    (r"router\.e_score_correction_bias", "correction_bias"),
    (r"shared_experts?\.(.*)", r"shared_expert.\1"),
    (r"experts\.(?:gate_up_proj|up_proj)", "experts.w1"),
    (r"experts\.down_proj", "experts.w2"),
    (r"experts\.(?:gate_up_proj|up_proj)_bias", "experts.w1_bias"),
    (r"experts\.down_proj_bias", "experts.w2_bias"),
    (r"experts\.(?:gate_up_proj|up_proj)_scale_inv", "experts.w1_scale"),
    (r"experts\.down_proj_scale_inv", "experts.w2_scale"),
    (r"experts\.gate_up_proj_blocks", "experts.w1"),
    (r"experts\.down_proj_blocks", "experts.w2"),
    (r"experts\.gate_up_proj_scales", "experts.w1_scale"),
    (r"experts\.down_proj_scales", "experts.w2_scale"),
)
_OF_ONE_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.(weight|bias|weight_scale_inv)")
# Mixtral's checkpoints count the projections.
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SUFFIXES = {"weight": "", "bias": "_bias", "weight_scale_inv": "_scale"}


def convert_hf_state_dict(
    state_dict: Mapping[str, Tensor], prefix: str = "", *, transposed: bool = False
) -> dict[str, Tensor]:
    """Converts the state dict of a transformers MoE block, or of its checkpoint, to that of `MoELayer`.

    ==================================================  ==========================================
    transformers                                        MoELayer
    ==================================================  ==========================================
    gate.weight, router.weight, their bias              router.weight, router.bias
    gate.e_score_correction_bias                        correction_bias, in float32
    experts.gate_up_proj, experts.down_proj             experts.w1, experts.w2; transposed: views
    experts.up_proj (no gate)                           experts.w1
    experts.gate_up_proj_bias, experts.down_proj_bias   experts.w1_bias, experts.w2_bias
    experts.gate_up_proj_scale_inv, ...                 experts.w1_scale, experts.w2_scale
    experts.gate_up_proj_blocks, ..._scales, ...        experts.w1, experts.w1_scale, ... (mxfp4)
    experts.3.gate_proj.weight, experts.3.w1.weight     rows of experts.w1, above those of up_proj, w3
    experts.3.down_proj.weight, experts.3.w2.weight     experts.w2[3]
    shared_expert.*, shared_experts.*                   shared_expert.*
    shared_expert_gate.weight                           the same
    ==================================================  ==========================================

    Tensors that exist already are the same ones; experts that are apart are stacked, which copies them.

    Args:
        state_dict: names and tensors, with the shapes that the block has; only names that start with `prefix` are read.
        prefix: of the block, such as "model.layers.0.mlp.".
        transposed: `experts.gate_up_proj` is [E, H, 2 * I] and `experts.down_proj` [E, I, H], as those of
            transformers' gpt-oss are.

    Returns:
        Names and tensors, as `MoELayer` has them, for its `load_state_dict`.

    Raises:
        ValueError: a name that is none of these, or experts with gaps in their numbers.

    Example:
        >>> import torch
        >>> from moe_ops.nn import convert_hf_state_dict
        >>> block = {"mlp.gate.weight": torch.ones(2, 8)}
        >>> for i in range(2):
        ...     block |= {f"mlp.experts.{i}.{name}_proj.weight": torch.ones(4, 8) for name in ("gate", "up")}
        ...     block[f"mlp.experts.{i}.down_proj.weight"] = torch.ones(8, 4)
        >>> {name: list(tensor.shape) for name, tensor in convert_hf_state_dict(block, "mlp.").items()}
        {'router.weight': [2, 8], 'experts.w1': [2, 8, 8], 'experts.w2': [2, 8, 4]}
    """
    converted: dict[str, Tensor] = {}
    apart: dict[tuple[str, str], dict[int, Tensor]] = {}
    for full_name, tensor in state_dict.items():
        if not full_name.startswith(prefix):
            continue
        name = full_name[len(prefix) :]
        if match := _OF_ONE_EXPERT.fullmatch(name):
            expert, projection, kind = match.groups()
            projection = _PROJECTIONS.get(projection, projection)
            apart.setdefault((projection, kind), {})[int(expert)] = tensor
            continue
        new = _new_name(name)
        if new is None:
            raise ValueError(
                f"state_dict has {full_name!r}, expected the names of an MoE block after prefix={prefix!r}; pass the "
                "block's own prefix, or take the name out"
            )
        if new == "correction_bias":
            tensor = tensor.float()
        if name.endswith("_blocks"):
            tensor = tensor.flatten(-2)
        elif transposed and new in ("experts.w1", "experts.w2"):
            tensor = tensor.transpose(1, 2)
        converted[new] = tensor
    return converted | _stacked(apart)


def _new_name(name: str) -> str | None:
    if name.startswith(("router.weight", "router.bias", "shared_expert_gate.")):
        return name
    for pattern, new in _RENAMED:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return None


def _stacked(apart: dict[tuple[str, str], dict[int, Tensor]]) -> dict[str, Tensor]:
    """Experts one by one -> stacked, the rows of gate above those of up."""
    stacked = {}
    for (projection, kind), tensors in apart.items():
        if sorted(tensors) != list(range(len(tensors))):
            raise ValueError(
                f"state_dict has {projection} of experts {sorted(tensors)}, expected 0 to {len(tensors) - 1} without "
                "gaps; load the missing shards as well"
            )
        stacked[projection, kind] = torch.stack([tensors[i] for i in range(len(tensors))])
    result = {}
    for (projection, kind), tensor in stacked.items():
        if projection == "gate_proj":
            continue
        gate = stacked.get(("gate_proj", kind)) if projection == "up_proj" else None
        which = "w2" if projection == "down_proj" else "w1"
        result[f"experts.{which}{_SUFFIXES[kind]}"] = tensor if gate is None else torch.cat([gate, tensor], 1)
    return result
