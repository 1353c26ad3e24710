"""The modules of moe_ops.nn: what they compute, how they move, load, quantise and print themselves."""

import copy

import pytest
import torch
from torch.nn import functional

import moe_ops
from moe_ops.nn import FusedExperts, MoELayer, SharedExpert, convert_hf_state_dict
from moe_ops.quantization import quantize_weights

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 128, 64
FORMATS = {
    "fp8_w8a8": [{"granularity": "tensor"}, {"granularity": "channel"}, {"block_shape": (128, 128)}],
    "int8_w8a8": [{}, {"block_shape": (128, 128)}],
    "int8_w8a16": [{}, {"block_shape": (0, 32), "zero_points": True}],
    "int4_w4a16": [{"block_shape": (0, 32)}, {"block_shape": [0, 64], "zero_points": True}],
    "mxfp4_w4a16": [{}],
}
CASES = [pytest.param(name, options, id=f"{name}{options}") for name, cases in FORMATS.items() for options in cases]


def make_experts(**options):
    torch.manual_seed(0)
    experts = FusedExperts(EXPERTS, HIDDEN, INTERMEDIATE, **options)
    for bias in (experts.w1_bias, experts.w2_bias):
        if bias is not None:
            torch.nn.init.normal_(bias)
    return experts


def make_inputs(*leading, dtype=torch.float32):
    torch.manual_seed(1)
    weights, ids = torch.randn(*leading, EXPERTS).softmax(-1).topk(TOP_K)
    return torch.randn(*leading, HIDDEN, dtype=dtype), weights, ids


def constructor_options(quantization, options):
    """What makes an empty module of the same format."""
    options = dict(options)
    return {"quantization": quantization, "per_tensor": options.pop("granularity", None) == "tensor", **options}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"bias": True, "activation": "swigluoai", "activation_alpha": 1.3, "activation_limit": 0.5},
        {"activation": "relu2_no_gate"},
        {"gate_up_layout": "interleaved", "activation": "gelu", "routed_scaling_factor": 2.5},
        {"apply_router_weight_on_input": True},
    ),
    ids=str,
)
def test_experts_are_the_op(options):
    experts = make_experts(**options)
    x, weights, ids = make_inputs(3, 5)
    flat = x.flatten(0, 1), experts.w1, experts.w2, weights.flatten(0, 1), ids.flatten(0, 1)
    options.pop("bias", None)
    expected = moe_ops.fused_moe(*flat, experts.w1_bias, experts.w2_bias, **options)
    assert torch.equal(experts(x, weights, ids), expected.view(3, 5, HIDDEN))
    assert experts(*make_inputs(0)).shape == (0, HIDDEN)
    assert experts(*make_inputs()).shape == (HIDDEN,)


@torch.no_grad()
def test_expert_map():
    experts = make_experts()
    x, weights, ids = make_inputs(5)
    everyone = torch.arange(EXPERTS, dtype=torch.int32)
    assert torch.equal(experts(x, weights, ids, everyone), experts(x, weights, ids))
    assert not experts(x, weights, ids, torch.full_like(everyone, -1)).any()


@torch.no_grad()
@pytest.mark.parametrize("quantization, options", CASES)
def test_quantize(quantization, options):
    experts = make_experts(bias=True)
    exact = experts(*make_inputs(7))
    made = {name: quantize_weights(getattr(experts, name), quantization, **options) for name in ("w1", "w2")}
    assert experts.quantize_(quantization, **options) is experts
    for name, parts in made.items():
        for suffix, expected in zip(("", "_scale", "_zero_point"), parts, strict=True):
            got = getattr(experts, name + suffix)
            assert got is None if expected is None else torch.equal(got, expected)
    error = (experts(*make_inputs(7)) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.2
    with pytest.raises(ValueError, match=f"quantization is '{quantization}' already"):
        experts.quantize_("int8_w8a8")


@torch.no_grad()
@pytest.mark.parametrize("quantization, options", CASES)
def test_meta_then_load(quantization, options):
    experts = make_experts(bias=True).quantize_(quantization, **options)
    expected = experts(*make_inputs(7))
    empty = FusedExperts(
        EXPERTS, HIDDEN, INTERMEDIATE, bias=True, device="meta", **constructor_options(quantization, options)
    )
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    assigned = copy.deepcopy(empty)
    empty.to_empty(device="cpu").load_state_dict(experts.state_dict())
    assigned.load_state_dict(experts.state_dict(), assign=True)
    for module in (empty, assigned):
        assert torch.equal(module(*make_inputs(7)), expected)


@torch.no_grad()
@pytest.mark.parametrize("quantization, options", CASES)
def test_fresh_quantised_weights_are_zero(quantization, options):
    experts = FusedExperts(EXPERTS, HIDDEN, INTERMEDIATE, **constructor_options(quantization, options))
    assert not experts(*make_inputs(7)).any()


@torch.no_grad()
@pytest.mark.parametrize("quantization, options", CASES)
def test_to_keeps_what_is_quantised(quantization, options):
    experts = make_experts(bias=True).quantize_(quantization, **options)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    experts.to(torch.bfloat16).half().to("cpu")
    for name, tensor in experts.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == torch.float16
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    assert experts(*make_inputs(7, dtype=torch.float16)).dtype == torch.float16
    assert {t.device.type for t in experts.to("meta").state_dict().values()} == {"meta"}


def test_to_casts_unquantised_weights():
    experts = make_experts().to(torch.bfloat16)
    assert experts.w1.dtype == experts.w2.dtype == torch.bfloat16
    assert FusedExperts(2, 16, 8, dtype=torch.float16, bias=True).w2_bias.dtype == torch.float16


@pytest.mark.parametrize("options, message", [
    ({"intermediate_size": 0}, "intermediate_size is 0, expected at least 1"),
    ({"activation": "tanh"}, "activation is 'tanh', expected one of 'silu'"),
    ({"gate_up_layout": "x"}, "gate_up_layout is 'x'"),
    ({"quantization": "int3"}, "quantization is 'int3'"),
    ({"block_shape": (0, 32)}, "block_shape, per_tensor or zero_points was given, but quantization is 'none'"),
    ({"quantization": "int4_w4a16"}, "needs groups"),
    ({"quantization": "int8_w8a16", "zero_points": True}, "zero_points is True"),
    ({"quantization": "mxfp4_w4a16", "intermediate_size": 5}, "intermediate_size is 5, expected an even number"),
])  # fmt: skip
def test_errors(options, message):
    sizes = {"num_experts": 4, "hidden_size": 128, "intermediate_size": 64}
    with pytest.raises(ValueError, match=message):
        FusedExperts(**{**sizes, **options})


def test_failed_quantize_changes_nothing():
    experts = FusedExperts(2, 32, 33)
    w1 = experts.w1
    with pytest.raises(ValueError, match="expected an even number"):
        experts.quantize_("mxfp4_w4a16")
    assert experts.quantization == "none" and experts.w1 is w1 and experts.w1_scale is None


@torch.no_grad()
@pytest.mark.parametrize("quantization", ("none", "int8_w8a16"))
def test_compile(quantization):
    layer = make_layer(correction_bias=True, scoring="sigmoid", renormalize=True)
    if quantization != "none":
        layer.experts.quantize_(quantization)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 3):
        x = torch.randn(2, tokens, HIDDEN)
        torch.testing.assert_close(compiled(x), layer(x))


def test_repr_and_plan():
    experts = make_experts(bias=True)
    sizes = "FusedExperts(4 experts, hidden_size=128, intermediate_size=64, silu"
    assert repr(experts) == f"{sizes}, torch.float32, bias, cpu)"
    plan = experts.explain(16, TOP_K)
    assert plan == moe_ops.explain(*make_explained(experts, 16))
    assert repr(experts).endswith(", cpu, 16 tokens: cpu)")
    experts.quantize_("fp8_w8a8", block_shape=(128, 128))
    assert repr(experts) == f"{sizes}, fp8_w8a8 in blocks of [128, 128], bias, cpu)"
    assert "fp8_w8a8" in repr(experts.to("meta")) and "meta" in repr(experts)
    del experts.w1, experts.w1_bias
    assert repr(experts).startswith(sizes)
    assert "interleaved" in repr(FusedExperts(2, 16, 8, gate_up_layout="interleaved"))


def make_explained(experts, tokens):
    x, weights, ids = make_inputs(tokens)
    return x, experts.w1, experts.w2, weights, ids, experts.w1_bias, experts.w2_bias


def test_explain_checks():
    with pytest.raises(ValueError, match="path"):
        make_experts(path="tma").explain(3, TOP_K)


def make_layer(**options):
    torch.manual_seed(2)
    layer = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, **options)
    if layer.correction_bias is not None:
        layer.correction_bias.normal_()
    return layer


@torch.no_grad()
@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "relu2_no_gate"))
@pytest.mark.parametrize("shared", ({}, {"shared_gate": True}))
def test_layer(activation, shared):
    layer = make_layer(activation=activation, shared_intermediate_size=48, renormalize=True, router_bias=True, **shared)
    x = torch.randn(2, 5, HIDDEN)
    scores, ids = layer.router(x).softmax(-1).topk(TOP_K)
    expected = layer.experts(x, scores / scores.sum(-1, keepdim=True), ids)
    act = {"silu": functional.silu, "relu2_no_gate": lambda x: x.relu().square()}.get(
        activation, lambda x: functional.gelu(x, approximate="tanh")
    )
    expert = layer.shared_expert
    up = expert.up_proj(x)
    up = act(up) if expert.gate_proj is None else act(expert.gate_proj(x)) * up
    gate = layer.shared_expert_gate(x).sigmoid() if shared else 1
    torch.testing.assert_close(layer(x), expected + gate * expert.down_proj(up))


@torch.no_grad()
def test_router_dtype_and_bias_dtype():
    layer = make_layer(correction_bias=True, router_dtype=torch.float32).to(torch.bfloat16)
    assert layer.correction_bias.dtype == torch.float32 and layer.router.weight.dtype == torch.bfloat16
    x = torch.randn(64, HIDDEN, dtype=torch.bfloat16)
    expected = moe_ops.topk_route(x.float() @ layer.router.weight.float().T, TOP_K, layer.correction_bias)
    for got, want in zip(layer.route(x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert layer(x).dtype == torch.bfloat16


def test_layer_errors():
    with pytest.raises(ValueError, match="shared_gate is True, but there is no shared expert"):
        make_layer(shared_gate=True)
    with pytest.raises(ValueError, match="num_groups is 3"):
        make_layer(num_groups=3)
    with pytest.raises(ValueError, match=rf"has shape \[2, {HIDDEN - 1}\], expected \[\.\.\., {HIDDEN}\]"):
        make_layer()(torch.randn(2, HIDDEN - 1))
    with pytest.raises(ValueError, match="activation is 'swigluoai'"):
        SharedExpert(8, 8, activation="swigluoai")


def test_layer_repr():
    layer = make_layer(scoring="sigmoid", num_groups=2)
    assert "top_k=2, scoring=sigmoid, num_groups=2\n" in repr(layer) and "FusedExperts(4 experts" in repr(layer)


@pytest.mark.parametrize("part", ("router", "experts"))
def test_training_says_that_there_is_no_backward(part):
    layer = make_layer().train()
    layer.requires_grad_(False)
    getattr(layer, part).requires_grad_(True)
    loss = layer(torch.randn(3, HIDDEN)).sum()
    with pytest.raises(NotImplementedError, match="has no backward: it is for inference"):
        loss.backward()


def test_convert_errors():
    with pytest.raises(ValueError, match=r"state_dict has 'mlp.norm.weight', expected the names of an MoE block"):
        convert_hf_state_dict({"mlp.norm.weight": torch.ones(1)}, "mlp.")
    with pytest.raises(ValueError, match=r"up_proj of experts \[0, 2\], expected 0 to 1 without gaps"):
        convert_hf_state_dict({f"experts.{i}.up_proj.weight": torch.ones(1, 1) for i in (0, 2)})
