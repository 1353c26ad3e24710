"""The frozen schemas: a saved program binds arguments by position and name, so none may move, change or vanish.

A new tensor goes before the `*`, a new scalar to the end; only then is a golden text below extended.
"""

import dataclasses
import inspect

import pytest
import torch

import moe_ops
from moe_ops.arguments import Arguments

FUSED_MOE = torch.ops.moe_ops.fused_moe_tma.default
FUSED_MOE_ = torch.ops.moe_ops.fused_moe_tma_.default
ROUTE = torch.ops.moe_ops.route.default
TOPK_ROUTE = torch.ops.moe_ops.topk_route.default

ARGUMENTS = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? w1_bias=None, "
    "Tensor? w2_bias=None, Tensor? w1_scale=None, Tensor? w2_scale=None, Tensor? w1_zero_point=None, "
    "Tensor? w2_zero_point=None, Tensor? a1_scale=None, Tensor? a2_scale=None, Tensor? expert_map=None, *, "
    'str activation="silu", float? activation_alpha=None, float? activation_limit=None, '
    'str gate_up_layout="concatenated", str quantization="none", int[]? block_shape=None, '
    "bool apply_router_weight_on_input=False, float routed_scaling_factor=1., bool reduce_topk=True, "
    'bool deterministic=True, str path="auto", ScalarType? out_dtype=None'
)


def test_fused_moe():
    assert str(FUSED_MOE._schema) == f"moe_ops::fused_moe_tma({ARGUMENTS}) -> Tensor"


def test_fused_moe_out():
    assert str(FUSED_MOE_._schema) == f"moe_ops::fused_moe_tma_(Tensor(a!) out, {ARGUMENTS}) -> ()"


def test_route():
    assert str(ROUTE._schema) == (
        "moe_ops::route(Tensor topk_ids, int num_experts, int block, Tensor? expert_map=None) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )


def test_topk_route():
    assert str(TOPK_ROUTE._schema) == (
        "moe_ops::topk_route(Tensor logits, int top_k, Tensor? correction_bias=None, *, "
        'str scoring="softmax", bool renormalize=False, int num_groups=1, int topk_groups=1, str group_score="max", '
        "float routed_scaling_factor=1.) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("op", [FUSED_MOE, FUSED_MOE_, ROUTE, TOPK_ROUTE], ids=str)
def test_tags(op):
    assert torch.Tag.pt2_compliant_tag in op.tags
    # Any of these would change how compiled programs lay out, split or order the op.
    unwanted = {"cudagraph_unsafe", "flexible_layout", "needs_fixed_stride_order", "nondeterministic_seeded", "out"}
    assert not {tag.name for tag in op.tags} & unwanted


def test_no_other_overloads():
    for name in ("fused_moe_tma", "fused_moe_tma_", "route", "topk_route"):
        assert getattr(torch.ops.moe_ops, name).overloads() == ["default"]


def schema_arguments(op) -> list[tuple[str, object, bool]]:
    """(name, default, keyword only) of every argument; `inspect.Parameter.empty` where there is no default."""
    return [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty, a.kwarg_only)
        for a in op._schema.arguments
    ]


def function_arguments(function) -> list[tuple[str, object, bool]]:
    return [
        (p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
    ]


def test_arguments_are_the_schemas():
    empty = inspect.Parameter.empty
    fields = [
        (field.name, empty if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(Arguments)
    ]
    assert fields == [(name, default) for name, default, _ in schema_arguments(FUSED_MOE)]


def test_api_signatures_are_the_schemas():
    assert function_arguments(moe_ops.fused_moe) == schema_arguments(FUSED_MOE)
    assert function_arguments(moe_ops.route) == schema_arguments(ROUTE)
    assert function_arguments(moe_ops.topk_route) == schema_arguments(TOPK_ROUTE)


def test_the_out_variant_differs_by_its_buffer_alone():
    out, *rest = FUSED_MOE_._schema.arguments
    assert (out.name, str(out.type), out.alias_info.is_write) == ("out", "Tensor", True)
    assert not any(argument.alias_info for argument in rest)
    assert schema_arguments(FUSED_MOE_)[1:] == schema_arguments(FUSED_MOE)


def test_api_passes_every_argument_on(monkeypatch):
    """Each argument of the function reaches the op's argument of the same name."""
    names = [name for name, _, _ in schema_arguments(FUSED_MOE)]
    seen = {}

    def op(*args, **kwargs):
        positional = [name for name, _, keyword_only in schema_arguments(FUSED_MOE) if not keyword_only]
        seen.update(dict(zip(positional, args, strict=True)), **kwargs)

    assert moe_ops.api._FUSED_MOE is torch.ops.moe_ops.fused_moe_tma.default
    monkeypatch.setattr(moe_ops.api, "_FUSED_MOE", op)
    moe_ops.fused_moe(**{name: f"value of {name}" for name in names})
    assert seen == {name: f"value of {name}" for name in names}
