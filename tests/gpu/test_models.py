"""Modules of `moe_ops.nn` and models of transformers on a GPU."""

import pytest
import torch

from moe_ops.arguments import Arguments
from moe_ops.nn import MoELayer, convert_hf_state_dict
from moe_ops.testing import assert_correct

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_ops.integrations import transformers as integration
from scripts import families
from tests.integrations import test_fp8 as fp8
from tests.integrations.test_families import FALLBACKS, GENERATE, INSTALLED, QUICK
from tests.integrations.test_nn import BLOCKS, make_block

pytestmark = pytest.mark.usefixtures("registered")

DEVICE = "cuda"
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 16, 4
QUANTIZED = {
    "fp8": {"quantization": "fp8_w8a8", "block_shape": (128, 128)},
    "int4": {"quantization": "int4_w4a16", "block_shape": (0, 32), "zero_points": True},
    "mxfp4": {"quantization": "mxfp4_w4a16"},
}
ROUTERS = {
    "qwen3": {"renormalize": True},
    "gpt_oss": {
        **{"scoring": "topk_softmax", "router_bias": True, "bias": True},
        **{"activation": "swigluoai", "gate_up_layout": "interleaved"},
    },
    "deepseek_v3": {
        **{"scoring": "sigmoid", "renormalize": True, "num_groups": 4, "topk_groups": 2, "group_score": "top2"},
        **{"routed_scaling_factor": 2.5, "correction_bias": True, "router_dtype": torch.float32},
    },
}
# Of a result's row in 16 bits; the one in the middle counts, since a router that hesitates between two experts may
# take the other one after a different rounding.
FACTOR, MOST = 1.25, 0.1


def make_layer(router="qwen3", form="none", dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, device=DEVICE, dtype=dtype, **ROUTERS[router])
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if "bias" in name:
            tensor.data.normal_(std=0.3)
    if form in QUANTIZED:
        layer.experts.quantize_(**QUANTIZED[form])
    return layer.eval()


def check_layer(out, layer, x):
    """The op's rule, for the routes that the layer takes."""
    experts = layer.experts
    assert_correct(
        out, Arguments(x, experts.w1, experts.w2, *layer.route(x), **experts._tensors(), **experts._options())
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "router, form", [*((name, "none") for name in ROUTERS), *(("qwen3", form) for form in QUANTIZED)]
)
def test_layer(router, form):
    layer = make_layer(router, form)
    for tokens in (1, 70):
        x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        check_layer(layer(x), layer, x)


@torch.no_grad()
def test_layer_compiled_and_captured():
    layer = make_layer("deepseek_v3")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(33, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    check_layer(compiled(x), layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(2):
        x.copy_(torch.randn(33, HIDDEN))
        graph.replay()
        assert torch.equal(out, layer(x))
    check_layer(out, layer, x)


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers(name):
    """A block of transformers and the layer with its state dict, in float32."""
    block, layer = make_block(name)
    block = block.to(DEVICE)
    layer.load_state_dict(convert_hf_state_dict(block.state_dict(), transposed=name == "gpt_oss"), assign=True)
    x = torch.randn(2, 9, layer.experts.hidden_size, device=DEVICE)
    expected, got = block(x), layer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert families.difference(got, expected) <= families.TOLERANCE


@pytest.mark.parametrize("family", INSTALLED)
def test_family(family):
    """Logits in float32, and that the op was called: `families.judge` raises otherwise."""
    verdict, _ = families.verdict_of(family, DEVICE)
    assert verdict.result == ("fallback" if family in FALLBACKS else "fused"), verdict


def rows(result, expected):
    """Errors of the rows of logits, relative to their norms."""
    return ((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


@pytest.mark.parametrize("family", [name for name in QUICK if name not in FALLBACKS])
def test_family_in_16_bits(family, calls):
    """In bfloat16 no worse than transformers' eager experts, both against the same weights in float32."""
    if family not in INSTALLED:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    verdict, model = families.verdict_of(family, DEVICE)
    assert verdict.result == "fused", verdict
    expected = families.outputs(model.bfloat16().float(), "eager", 48).double()
    model = model.bfloat16()
    eager = rows(families.outputs(model, "eager", 48), expected).median().item()
    calls.clear()
    ours = rows(families.outputs(model, "moe_ops", 48), expected).median().item()
    assert calls and 0 < ours <= FACTOR * eager and eager <= MOST, (ours, eager)


@pytest.mark.parametrize("name", ("deepseek_v3", "mixtral", "qwen3_moe"))
def test_fused_routers_in_16_bits(name):
    """No worse than the routers of transformers, both against the same weights in float32; captured, too."""
    _, model = families.verdict_of(name, DEVICE)
    expected = families.outputs(model.bfloat16().float(), "eager", 48).double()
    model = model.bfloat16()
    eager = rows(families.outputs(model, "eager", 48), expected).median().item()
    assert integration.fuse_routers(model)
    ours = rows(families.outputs(model, "moe_ops", 48), expected).median().item()
    assert 0 < ours <= FACTOR * eager and eager <= MOST, (ours, eager)
    block = next(block for block in model.modules() if hasattr(block, "experts") and hasattr(block, "gate"))
    x = torch.randn(1, 33, block.gate.weight.shape[1], device=DEVICE, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        block(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = block(x)
        x.copy_(torch.randn(x.shape))
        graph.replay()
        assert torch.equal(out, block(x))


@pytest.mark.parametrize("family", GENERATE)
def test_generate(family, calls):
    """The same tokens as with eager experts, in float32."""
    if family not in INSTALLED:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    _, model = families.verdict_of(family, DEVICE)
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    model.set_experts_implementation("moe_ops")
    calls.clear()
    written = model.generate(ids, **options)
    assert written.shape == (2, 15) and calls
    calls.clear()
    model.set_experts_implementation("eager")
    assert torch.equal(written, model.generate(ids, **options)) and not calls


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)))
@pytest.mark.parametrize("options", ({}, {"scale_fmt": "ue8m0"}, {"attributes": {"swiglu_limit": 0.5}}), ids=str)
def test_fp8_experts(options, dtype, tolerance, calls, monkeypatch):
    """Experts of FP8 checkpoints against transformers' loop with its product in plain torch."""
    monkeypatch.setattr(fp8.finegrained_fp8, "fp8_linear", fp8.fp8_linear)
    module = fp8.make_module(**options).to(DEVICE)
    inputs = [x.to(DEVICE) for x in fp8.make_inputs(dtype)]
    expected = fp8.run(module, "eager", *inputs).float()
    got = fp8.run(module, "moe_ops", *inputs)
    assert got.dtype == dtype and calls[0]["quantization"] == "fp8_w8a8"
    assert (got.float() - expected).norm() <= tolerance * expected.norm()
    assert integration.plan_of(module, *inputs).path == ("tma" if dtype == torch.bfloat16 else "classic")
