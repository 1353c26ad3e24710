"""The strategies draw calls that the op accepts, of every kind, and that their repr builds again."""

import contextlib
import functools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe_ops.activations import ACTIVATIONS
from moe_ops.dispatch import tma_obstacle
from moe_ops.problem import make_problem
from moe_ops.quantization.scheme import FORMATS
from moe_ops.testing import ROUTINGS, strategies
from moe_ops.testing.strategies import LAYOUTS, Call, assert_result, build, calls, formats
from tests.cases import run
from tests.unit.test_dispatch import INTERPRETER

EXAMPLES = settings(
    max_examples=50, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
HALF = (torch.bfloat16, torch.float16)


def same(one, other) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a.double().nan_to_num(7), b.double().nan_to_num(7)) for a, b in pairs)


@EXAMPLES
@given(st.one_of(calls(), calls(quantized=formats()), calls(dtypes=HALF, quantized=formats())))
def test_calls_are_right_and_repeatable(call):
    again = eval(repr(call), {"Call": Call, "torch": torch})
    assert again == call
    args = build(call)
    problem = make_problem(args)
    assert (problem.num_tokens, problem.hidden_size, problem.num_experts) == (
        call.num_tokens,
        call.hidden,
        call.experts,
    )
    assert same(args, build(again))
    assert tma_obstacle(problem, INTERPRETER) is None


@EXAMPLES
@given(calls(tma=False, dtypes=(torch.bfloat16,)))
def test_calls_for_the_classic_path_run(call):
    args = build(call)
    assert args.w1.dtype == torch.bfloat16
    assert not run(args).isnan().any()


@EXAMPLES
@given(calls(tma=False, dtypes=HALF, quantized=formats()))
def test_quantized_calls_for_the_classic_path_run(call):
    args = build(call)
    assert args.quantization == call.quantized["quantization"]
    assert_result(run(args, path="reference"), args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (1, 1)], ids=str)
def test_layouts_keep_shape_and_values(layout, shape):
    for tensor in (torch.randn(shape), torch.randint(9, shape)):
        out = strategies._lay_out(tensor, layout)
        assert out.shape == tensor.shape and out.dtype == tensor.dtype
        assert torch.equal(out, tensor[:1].expand_as(tensor) if layout == "expanded" else tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wrong_results_are_found(dtype):
    args = build(Call(2, 16, 8, experts=3, top_k=1, dtype=dtype))
    out = run(args)
    assert_result(out, args)
    for wrong in (out * 1.01, out.roll(1, 0), torch.zeros_like(out), out.double()):
        with pytest.raises(AssertionError):
            assert_result(wrong, args)
    args = build(Call(2, 16, 8, experts=3, top_k=1, dtype=dtype, expert_map=(-1, 3)))
    assert_result(torch.zeros_like(out), args)
    for wrong in (out, torch.zeros_like(out[:1]), torch.zeros_like(out).double()):
        with pytest.raises(AssertionError):
            assert_result(wrong, args)


def test_an_unknown_layout():
    with pytest.raises(ValueError, match="layout is 'rotated', expected one of 'contiguous'"):
        build(Call(1, 8, 8, 1, 1, layouts={"w1": "rotated"}))


WANTED = {
    "no tokens": lambda call: call.num_tokens == 0,
    "top_k above E": lambda call: call.top_k > call.experts,
    "wider result": lambda call: call.options.get("out_dtype") == torch.float32 and call.dtype == torch.float16,
    "int64": lambda call: call.index_dtype == torch.int64,
    "one bias": lambda call: call.w1_bias is None and call.w2_bias is not None,
    "map": lambda call: call.expert_map is not None and len(call.expert_map) > call.experts,
    "weights major in different dimensions": lambda call: (
        (call.layouts.get("w1") == "transposed") != (call.layouts.get("w2") == "transposed")
    ),
    "blocks without a tail": lambda call: call.hidden % 64 == 0 and call.intermediate % 64 == 8,
    **{f"routing {name}": lambda call, name=name: call.routing == name for name in ROUTINGS},
    **{
        f"activation {name}": lambda call, name=name: call.options.get("activation", "silu") == name
        for name in ACTIVATIONS
    },
    **{f"layout {name}": lambda call, name=name: name in call.layouts.values() for name in LAYOUTS[1:]},
    **{
        name: lambda call, name=name: name in call.options
        for name in (
            "gate_up_layout",
            "activation_limit",
            "activation_alpha",
            "apply_router_weight_on_input",
            "routed_scaling_factor",
            "reduce_topk",
        )
    },
}


class Enough(Exception):
    """What was wanted has been drawn."""


def draw(wanted: dict, **kinds) -> list[Call]:
    """Some hundred calls, and then others until every wanted kind is among them."""
    seen, missing = [], dict(wanted)

    # Up to many, since what Hypothesis draws changes with constants anywhere in the sources.
    @settings(EXAMPLES, max_examples=1000, phases=(Phase.generate,))
    @given(calls(**kinds))
    def draw_one(call):
        seen.append(call)
        for name in [name for name, holds in missing.items() if holds(call)]:
            del missing[name]
        if len(seen) > 250 and not missing:
            raise Enough

    with contextlib.suppress(Enough):
        draw_one()
    return seen


@functools.cache
def drawn() -> list[Call]:
    return draw(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_every_kind_is_drawn(name):
    assert any(map(WANTED[name], drawn()))


QUANTIZED = {
    **{name: lambda call, name=name: call.quantized["quantization"] == name for name in FORMATS[1:]},
    **{
        name: lambda call, name=name: name in call.quantized
        for name in ("granularity", "block_shape", "zero_points", "weight_dtype", "scale_dtype", "inputs_given")
    },
    "e8m0": lambda call: call.quantized.get("scale_dtype") == torch.float8_e8m0fnu,
    "a scale per expert": lambda call: call.quantized.get("static") == "expert",
    "one scale for all inputs": lambda call: call.quantized.get("inputs_given") == "tensor",
    "a scale per row": lambda call: "block_shape" not in call.quantized,
    "a block in gate and up": lambda call: (
        call.quantized.get("block_shape") == (128, 128) and call.intermediate > 128 and call.intermediate % 128 > 0
    ),
    "short groups": lambda call: (
        call.quantized["quantization"] == "int4_w4a16" and call.hidden % call.quantized["block_shape"][1] > 0
    ),
    **{
        f"layout of {name}": lambda call, name=name: name in call.layouts
        for name in ("w1_scale", "w2_scale", "w1_zero_point", "w2_zero_point", "a1_scale", "a2_scale")
    },
}


@functools.cache
def drawn_quantized() -> list[Call]:
    return draw(QUANTIZED, tma=False, max_size=288, quantized=formats())


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_format_is_drawn(name):
    assert any(map(QUANTIZED[name], drawn_quantized()))


@EXAMPLES
@given(formats(("fp8_w8a8",), blocks=False), formats(("int8_w8a8",), blocks=True))
def test_formats_can_be_chosen(rows, blocks):
    assert (rows["quantization"], blocks["quantization"]) == ("fp8_w8a8", "int8_w8a8")
    assert "block_shape" not in rows and "block_shape" in blocks


def test_any_size_without_tma():
    assert any(call.hidden % 2 for call in drawn_quantized())
    packed = [call for call in drawn_quantized() if "4a16" in call.quantized["quantization"]]
    assert not any(call.hidden % 2 or call.intermediate % 2 for call in packed)
    odd = {"odd sizes": lambda call: call.hidden % 8 and call.intermediate % 2}
    assert any(map(odd["odd sizes"], draw(odd, tma=False)))
    assert not any(call.hidden % 8 or call.intermediate % 8 for call in drawn())
