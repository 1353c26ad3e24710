"""Quantised calls on the CPU: what scheme they are, and that the rule sees a scale or zero point in a wrong place."""

import pytest
import torch

from moe_ops.problem import make_problem
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import assert_correct, emulate, errors, quantized_inputs
from tests.cases import run

# Neither H nor 2 I nor I is a multiple of 128, and 2 I has its second block of rows inside up.
SIZES = {"num_tokens": 24, "hidden": 272, "intermediate": 144, "experts": 5, "top_k": 2}
BLOCKS, GROUPS = {"block_shape": (128, 128)}, {"block_shape": (0, 32)}
# name: options, scales of the hidden states, scales of the activation, rms error of the emulator from .. to.
CALLS = {
    "fp8_tensor": ({"granularity": "tensor"}, "token", "token", (2e-2, 5e-2)),
    "fp8_channel": ({}, "token", "token", (2e-2, 5e-2)),
    "fp8_e5m2": ({"weight_dtype": torch.float8_e5m2}, "token", "token", (2e-2, 5e-2)),
    "fp8_blocks": (BLOCKS, "group", "group", (2e-2, 5e-2)),
    "fp8_given": ({"inputs_given": True}, "token", "token", (1e-2, 3e-2)),
    "fp8_given_tensor": ({"inputs_given": "tensor"}, "tensor", "token", (1e-2, 3e-2)),
    "fp8_given_blocks": ({"inputs_given": True, **BLOCKS}, "group", "group", (1e-2, 3e-2)),
    "fp8_static": ({"granularity": "tensor", "static": True}, "tensor", "tensor", (2e-2, 6e-2)),
    "fp8_static_expert": ({"static": "expert"}, "tensor", "expert", (2e-2, 6e-2)),
    "fp8_static_given": ({"static": "expert", "inputs_given": "tensor"}, "tensor", "expert", (1e-2, 5e-2)),
    "int8_channel": ({}, "token", "token", (5e-3, 3e-2)),
    "int8_blocks": (BLOCKS, "group", "group", (5e-3, 3e-2)),
    "int8_given": ({"inputs_given": True}, "token", "token", (5e-3, 3e-2)),
    "int8_weights_channel": ({}, "", "", (1e-3, 5e-3)),
    "int8_weights_groups": (GROUPS, "", "", (2e-3, 5e-3)),
    "int8_weights_zero_points": ({"zero_points": True, **GROUPS}, "", "", (2e-3, 5e-3)),
    "int4_groups": (GROUPS, "", "", (2e-3, 5e-3)),
    "int4_zero_points": ({"zero_points": True, "scale_dtype": torch.float16, **GROUPS}, "", "", (2e-3, 5e-3)),
    "int4_n_major": ({"n_major": True, **GROUPS}, "", "", (2e-3, 5e-3)),
    "mxfp4": ({}, "", "", (1e-3, 5e-3)),
    "mxfp4_e8m0": ({"scale_dtype": torch.float8_e8m0fnu}, "", "", (1e-3, 5e-3)),
}
FORMATS = {"fp8": "fp8_w8a8", "int8_weights": "int8_w8a16", "int8": "int8_w8a8", "int4": "int4_w4a16"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For products this small, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantization(name: str) -> str:
    return next((FORMATS[start] for start in FORMATS if name.startswith(start)), "mxfp4_w4a16")


def make(name: str, **sizes):
    return quantized_inputs(quantization=quantization(name), **{**SIZES, **CALLS[name][0], **sizes})


@pytest.mark.parametrize("name", CALLS)
def test_scheme_and_error(name):
    args = make(name)
    _, inputs, act, (low, high) = CALLS[name]
    problem = make_problem(args)
    scheme = problem.scheme
    assert (scheme.name, scheme.inputs, scheme.act) == (quantization(name), inputs, act)
    assert scheme.inputs_given == ("given" in name) and scheme.zero_points == ("zero_points" in name)
    assert problem.dtype == problem.out_dtype == torch.bfloat16
    assert low < assert_correct(emulate(args), args).rms < high
    reference = fused_moe_reference(args)
    assert 0.2 < reference.square().mean().sqrt() < 3
    assert errors(run(args, path="reference"), reference).rms < 2e-3


@pytest.mark.parametrize("name", CALLS)
def test_every_scale_is_another(name):
    args = make(name)
    for which in ("w1_scale", "w2_scale", "a1_scale", "a2_scale"):
        scale = getattr(args, which)
        if scale is None:
            continue
        values = scale.flatten()
        if scale.dtype.itemsize == 1:
            assert values.view(torch.uint8).unique().numel() >= 3
        elif scale.dtype == torch.float32:
            assert values.unique().numel() > 0.999 * values.numel()  # random float32 may meet
            assert scale.numel() < 5 or values.max() > 1.5 * values.min()


@pytest.mark.parametrize("name", CALLS)
def test_rule_sees_a_scale_in_a_wrong_place(name):
    args = make(name)
    seen = 0
    for which in ("w1_scale", "w2_scale", "w1_zero_point", "w2_zero_point", "a1_scale", "a2_scale"):
        right = getattr(args, which)
        if right is None:
            continue
        for dimension in range(right.ndim):
            if right.shape[dimension] > 1:
                moved = right.view(torch.uint8) if right.dtype.itemsize == 1 else right
                setattr(args, which, moved.roll(1, dimension).view(right.dtype))
                wrong = fused_moe_reference(args) if which != "a2_scale" else emulate(args)
                setattr(args, which, right)
                if which == "a2_scale":
                    # Two scales that both cover the values differ in nothing but which of them round.
                    assert not torch.equal(wrong, emulate(args))
                    continue
                with pytest.raises(AssertionError, match="error"):
                    assert_correct(wrong.to(torch.bfloat16), args)
                seen += 1
    assert seen >= 2


def test_dtypes_of_the_result():
    for dtype in (torch.float16, torch.float32):
        given = make("fp8_given", dtype=dtype)
        assert emulate(given).dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        assert emulate(make("fp8_channel", dtype=dtype)).dtype == dtype


def test_longest_sum_of_int8():
    """128 * 127 * K has to fit into int32."""
    sizes = {"experts": 1, "top_k": 1, "num_tokens": 1, "hidden": 8}
    args = quantized_inputs(quantization="int8_w8a8", intermediate=2**17, **sizes)
    assert make_problem(args).intermediate_size == 2**17
    args = quantized_inputs(quantization="int8_w8a8", intermediate=2**17 + 8, **sizes)
    with pytest.raises(ValueError, match=r"w2: I is 131080, expected at most 131072.*int8_w8a16"):
        make_problem(args)
