"""moe_ops.nn from transformers' modules and state dicts, against transformers' own forwards."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers import DeepseekV3Config, GptOssConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_ops.nn import FusedExperts, MoELayer, convert_hf_state_dict
from moe_ops.quantization import quantize_weights
from tests.integrations import test_fp8 as fp8
from tests.integrations.test_transformers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    assert_close,
    make_experts,
    make_inputs,
    of_class,
    randomise,
    run,
    with_hook,
)

SHARED = 24
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts_per_tok": TOP_K}
BLOCKS = {
    "qwen3": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=True),
        {"renormalize": True},
    ),
    "qwen2": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=False, shared_expert_intermediate_size=SHARED),
        {"shared_intermediate_size": SHARED, "shared_gate": True},
    ),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config(**SIZES, n_routed_experts=EXPERTS, n_group=2, topk_group=1, n_shared_experts=1),
        {
            **{"scoring": "sigmoid", "renormalize": True, "num_groups": 2, "topk_groups": 1, "group_score": "top2"},
            **{"routed_scaling_factor": 2.5, "correction_bias": True, "router_dtype": torch.float32},
            "shared_intermediate_size": INTERMEDIATE,
        },
    ),
    "gpt_oss": (
        GptOssMLP,
        GptOssConfig(
            **{"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_experts_per_tok": TOP_K},
            num_local_experts=EXPERTS,
        ),
        {
            **{"scoring": "topk_softmax", "router_bias": True, "bias": True},
            **{"activation": "swigluoai", "gate_up_layout": "interleaved"},
        },
    ),
}


def make_block(name):
    cls, config, options = BLOCKS[name]
    config._experts_implementation = "eager"
    block = randomise(cls(config))
    for buffer in block.buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(4))
    return block, MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, device="meta", **options)


def run_both(block, layer):
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = block(x)
        return layer(x), expected[0] if isinstance(expected, tuple) else expected


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dicts_of_blocks(name):
    block, layer = make_block(name)
    state = {f"model.layers.0.mlp.{key}": value for key, value in block.state_dict().items()}
    state["model.norm.weight"] = torch.ones(1)
    converted = convert_hf_state_dict(state, "model.layers.0.mlp.", transposed=name == "gpt_oss")
    assert converted["experts.w1"].data_ptr() == block.experts.gate_up_proj.data_ptr()
    layer.load_state_dict(converted, assign=True)
    assert_close(*run_both(block, layer))


@pytest.mark.parametrize("names", (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")))
def test_state_dicts_of_checkpoints(names):
    block, layer = make_block("qwen3")
    state = {"gate.weight": block.gate.weight}
    for i in range(EXPERTS):
        parts = *block.experts.gate_up_proj[i].chunk(2), block.experts.down_proj[i]
        state |= {f"experts.{i}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    layer.load_state_dict(convert_hf_state_dict(state), assign=True)
    assert_close(*run_both(block, layer))


def test_state_dict_of_fp8_experts():
    module = fp8.make_module()
    converted = convert_hf_state_dict(module.state_dict(prefix="experts."))
    assert set(converted) == {f"experts.{name}" for name in ("w1", "w2", "w1_scale", "w2_scale")}
    one_by_one = {}
    for name, ours in (("up_proj", "w1"), ("down_proj", "w2")):
        for i in range(fp8.EXPERTS):
            one_by_one[f"experts.{i}.{name}.weight"] = converted[f"experts.{ours}"][i]
            one_by_one[f"experts.{i}.{name}.weight_scale_inv"] = converted[f"experts.{ours}_scale"][i]
    for name, tensor in convert_hf_state_dict(one_by_one).items():
        assert torch.equal(tensor.view(torch.uint8), converted[name].view(torch.uint8))


def test_state_dict_of_mxfp4_experts():
    """As gpt-oss's checkpoint has them."""
    state, made = {}, {}
    for name, rows, columns in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
        made[name] = quantize_weights(torch.randn(EXPERTS, rows, columns), "mxfp4_w4a16")
        blocks = made[name].weight.view(EXPERTS, rows, -1, 16) if columns % 32 == 0 else made[name].weight[:, :, None]
        state |= {f"experts.{name}_blocks": blocks, f"experts.{name}_scales": made[name].scale}
        state[f"experts.{name}_bias"] = torch.randn(EXPERTS, rows)
    options = {"bias": True, "activation": "swigluoai", "gate_up_layout": "interleaved", "quantization": "mxfp4_w4a16"}
    layer = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, **options)
    layer.load_state_dict(convert_hf_state_dict(state), strict=False)
    assert torch.equal(layer.experts.w1, made["gate_up_proj"].weight)
    assert torch.equal(layer.experts.w2_scale, made["down_proj"].scale)
    assert torch.equal(layer.experts.w2_bias, state["experts.down_proj_bias"])


@pytest.mark.parametrize("package", ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v4", "openai_privacy_filter"))
def test_from_hf(package):
    module, (x, ids, weights) = make_experts(package), make_inputs()
    made = FusedExperts.from_hf(module)
    with torch.no_grad():
        assert_close(made(x, weights, ids), run(module, "eager", x, ids, weights))
    theirs = module.up_proj if package == "nemotron_h" else module.gate_up_proj
    assert made.w1.data_ptr() == theirs.data_ptr() and made.w2.data_ptr() == module.down_proj.data_ptr()
    if not module.is_transposed:
        assert made.w1 is theirs and made.w2 is module.down_proj
    assert made.training == module.training and (made.w1_bias is not None) == module.has_bias
    assert made.explain(4, TOP_K).path == "cpu"


@pytest.mark.parametrize("scale_fmt", ("float", "ue8m0"))
def test_from_hf_fp8(scale_fmt, monkeypatch):
    monkeypatch.setattr(fp8.finegrained_fp8, "fp8_linear", fp8.fp8_linear)
    module, (x, ids, weights) = fp8.make_module(scale_fmt), fp8.make_inputs()
    made = FusedExperts.from_hf(module)
    assert made.quantization == "fp8_w8a8" and made.block_shape == (128, 128) and not made.w1.requires_grad
    assert made.w1.data_ptr() == module.gate_up_proj.data_ptr()
    with torch.no_grad():
        expected = run(module, "eager", x, ids, weights)
        assert (made.to(torch.bfloat16)(x, weights, ids) - expected).norm() <= 1e-4 * expected.norm()


def test_from_hf_on_meta():
    with torch.device("meta"):
        module = make_experts("gpt_oss")
    made = FusedExperts.from_hf(module)
    assert made.w1.is_meta and "swigluoai, interleaved, torch.float32, bias, meta" in repr(made)


def test_from_hf_refuses():
    with pytest.raises(
        ValueError, match=r"module is a .*Qwen3MoeExperts, which the op cannot run: its act_fn has hooks"
    ):
        FusedExperts.from_hf(with_hook())
    with pytest.raises(ValueError, match="is not known"):
        FusedExperts.from_hf(of_class(type("Gate", (type(make_experts("qwen3_moe")),), {"_apply_gate": lambda *_: 0})))
