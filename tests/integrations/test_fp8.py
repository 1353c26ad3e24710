"""Experts of FP8 checkpoints through the op, against transformers' own loop with its fp8_linear in plain torch."""

import inspect
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers import Qwen3MoeConfig
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from moe_ops.integrations import transformers as integration
from moe_ops.quantization import dequantize, dequantize_activations, quantize_activations, quantize_weights

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 4, 2, 256, 192, 9
BLOCK = (128, 128)


@pytest.fixture(autouse=True)
def registered(registered, monkeypatch):
    monkeypatch.setattr(integration, "_LOGGED", set())
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)


def fp8_linear(x, weight, scale, block_size, bias=None, activation_scale=None, allow_deepgemm=True):
    """What transformers' kernel computes: rows in fp8 with a scale per 128 columns, weights per block."""
    rows = dequantize_activations(*quantize_activations(x, torch.float8_e4m3fn, "group"), torch.float32)
    return (rows @ dequantize(weight, scale.float(), "fp8_w8a8", block_shape=block_size).T).to(x.dtype)


def make_module(scale_fmt="float", block_size=BLOCK, has_gate=True, attributes=None, **options):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, hidden_act="silu"
    )
    attributes = attributes or {}
    if "expert_dtype" not in inspect.signature(FP8Experts.__init__).parameters:  # before transformers 5.24
        attributes |= {name: options.pop(name) for name in ("expert_dtype",) if name in options}
    for name, value in attributes.items():
        setattr(config, name, value)
    cls = use_experts_implementation(
        type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=has_gate
    )
    module = cls(config, block_size, scale_fmt=scale_fmt, has_gate=has_gate, **options)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj" if has_gate else "up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        if weight.dtype != torch.float8_e4m3fn or tuple(block_size or ()) != BLOCK:
            continue
        made = quantize_weights(torch.randn(weight.shape, generator=generator) * 0.1, "fp8_w8a8", block_shape=BLOCK)
        if made.scale.shape == scale.shape:
            # No two scales alike, and powers of two where the checkpoint has those.
            scales = made.scale * (1 + torch.rand(scale.shape, generator=generator))
            scale.data = scales.log2().round().exp2().to(scale.dtype) if scale_fmt == "ue8m0" else scales
            weight.data = made.weight
    return module


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weights, ids = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype), ids, weights


@torch.no_grad()
def run(module, implementation, *inputs):
    module.config._experts_implementation = implementation
    return module(*inputs)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"scale_fmt": "ue8m0"},
        {"attributes": {"swiglu_limit": 0.5}},
        {"attributes": {"swiglu_limit": 0.5, "swiglu_alpha": 1.3}},
        {"has_gate": False},
    ),
    ids=str,
)
def test_matches_transformers(options, dtype, tolerance, calls):
    module, inputs = make_module(**options), make_inputs(dtype)
    expected = run(module, "eager", *inputs).float()
    assert expected.abs().max() > 0.1
    got = run(module, "moe_ops", *inputs)
    assert got.dtype == dtype
    # Both round the activation to fp8, and at a tie the last bit before decides.
    assert (got.float() - expected).norm() <= tolerance * expected.norm()
    (options,) = calls
    assert options["quantization"] == "fp8_w8a8" and options["block_shape"] == BLOCK


def test_float32_scales_are_not_copied(calls):
    module = make_module()
    run(module, "moe_ops", *make_inputs())
    assert calls[0]["w1_scale"].data_ptr() == module.gate_up_proj_scale_inv.data_ptr()


def with_wide_scales():
    module = make_module()
    module.down_proj_scale_inv.data = torch.ones(EXPERTS, 2, 3)
    return module


@pytest.mark.parametrize(
    "make, reason",
    (
        (lambda: make_module(block_size=(64, 128)), r"its block_size is (64, 128), not [128, 128]"),
        (lambda: make_module(block_size=None), "its block_size is None"),
        (lambda: make_module(expert_dtype="fp4"), "its weights are torch.int8, not torch.float8_e4m3fn"),
        (lambda: make_module(activation_scheme="static"), "its activation_scheme is 'static'"),
        pytest.param(
            lambda: make_module(attributes={"mlp_gate_softcap": 2.0, "mlp_up_softcap": 2.0}),
            "with gate_softcap is not",
            marks=pytest.mark.skipif("softcap" not in inspect.getsource(FP8Experts), reason="newer transformers"),
        ),
        (with_wide_scales, f"its scales are [{EXPERTS}, 2, 3], not [{EXPERTS}, 2, 2]"),
    ),
)
def test_fallback(make, reason, calls, monkeypatch, caplog):
    module, inputs = make(), make_inputs()
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda module, *_: "fallback")
    with caplog.at_level(logging.WARNING, "moe_ops"):
        assert run(module, "moe_ops", *inputs) == "fallback"
    assert not calls and len(caplog.records) == 1 and reason in caplog.text


def test_compile():
    module, inputs = make_module(), make_inputs()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    expected = run(module, "moe_ops", *inputs)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), expected)


def test_plan_of():
    assert integration.plan_of(make_module(), *make_inputs()).path == "cpu"
