"""transformers models whose experts run through the op, against the same models with transformers' own experts."""

import functools
import importlib.util
import inspect
import logging
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from torch.utils._pytree import tree_map_only
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_ops.integrations import transformers as integration

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 8, 3, 32, 16
COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16) | dict.fromkeys(
    ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8
)
MODELS = {
    "Qwen3Moe": {"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS},
    "Mixtral": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    "Olmoe": {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS},
    "DeepseekV3": {
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        **LATENT,
    },
    "GptOss": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
}
# Experts classes by themselves: package, class, configuration class.
CLASSES = {
    "gpt_oss": ("GptOssExperts", "GptOssConfig"),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "OpenAIPrivacyFilterConfig"),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", "MiniMaxM3VLTextConfig"),
    "deepseek_v4": ("DeepseekV4Experts", "DeepseekV4Config"),
    "hy_v4": ("HYV4Experts", "HYV4Config"),
    "glm5_next": ("Glm5NextTextExperts", "Glm5NextTextConfig"),
    "qwen3_moe": ("Qwen3MoeExperts", "Qwen3MoeConfig"),
    "nemotron_h": ("NemotronHExperts", "NemotronHConfig"),
    "hy_v4_vl": ("HYV4VLExperts", "HYV4VLTextConfig"),
}


@pytest.fixture(autouse=True)
def registered(registered, monkeypatch):
    monkeypatch.setattr(integration, "_LOGGED", set())


@pytest.fixture
def calls(monkeypatch):
    """The calls of the op, as (args, kwargs)."""
    seen = []

    def fused_moe(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    original = integration.fused_moe
    monkeypatch.setattr(integration, "fused_moe", fused_moe)
    return seen


def randomise(module):
    """Large weights: the default ones are so small that no activation is far from linear."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.eval()


def make_model(name, implementation="moe_ops"):
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name]})
    return randomise(
        getattr(transformers, f"{name}ForCausalLM")._from_config(config, experts_implementation=implementation)
    )


def make_experts(package, **options):
    class_name, config_name = CLASSES[package]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    config = getattr(importlib.import_module(f"transformers.models.{package}.configuration_{package}"), config_name)
    sizes = {"moe_intermediate_size": INTERMEDIATE, "intermediate_size": INTERMEDIATE, "hidden_size": HIDDEN}
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS)
    return randomise(getattr(module, class_name)(config(**{**sizes, **counts, **options})))


def make_inputs(tokens=21):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=generator), ids, weights


@torch.no_grad()
def run(module, implementation, *inputs):
    module.config._experts_implementation = implementation
    return module(*inputs)


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model(name, calls):
    model = make_model(name)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    got = model(ids).logits
    assert len(calls) == LAYERS
    options = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
    written = model.generate(ids, **options)
    assert len(calls) == LAYERS + LAYERS * 6
    # Two sequences, one new token each: decoding went through the op as well.
    assert calls[-1][0][0].shape == (2, HIDDEN)

    model.set_experts_implementation("eager")
    calls.clear()
    expected = model(ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(written, model.generate(ids, **options))
    assert not calls


def test_from_pretrained(tmp_path, calls):
    make_model("Qwen3Moe", "eager").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_ops")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == LAYERS


@pytest.mark.parametrize("package", [name for name in CLASSES if name not in ("qwen3_moe", "nemotron_h")])
def test_gates_of_models(package, calls):
    if importlib.util.find_spec(f"transformers.models.{package}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no {package}")
    module = make_experts(package)
    inputs = make_inputs()
    loose = run(module, "eager", *inputs)
    # Clamps that clamp, and a slope that is nobody's default.
    for name in {"alpha", "swiglu_alpha", "limit", "swiglu_limit"} & vars(module).keys():
        setattr(module, name, 1.3 if "alpha" in name else 0.6)
    expected = run(module, "eager", *inputs)
    assert (loose - expected).abs().max() > 1e-2 * expected.abs().max()
    assert_close(run(module, "moe_ops", *inputs), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "act",
    (
        *("silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast"),
        "gelu_accurate",
    ),
)
def test_activations_with_gate(act, calls):
    module = make_experts("qwen3_moe", hidden_act=act)
    assert_close(run(module, "moe_ops", *make_inputs()), run(module, "eager", *make_inputs()))
    assert len(calls) == 1


@pytest.mark.parametrize("act", ("relu2", "silu", "gelu"))
def test_activations_without_gate(act, calls):
    module = make_experts("nemotron_h", mlp_hidden_act=act)
    assert_close(run(module, "moe_ops", *make_inputs()), run(module, "eager", *make_inputs()))
    assert calls[0][1] == {"activation": f"{act}_no_gate"}


def test_silu_function(calls):
    module = make_experts("qwen3_moe")
    del module.act_fn
    module.act_fn = torch.nn.functional.silu
    assert_close(run(module, "moe_ops", *make_inputs()), run(module, "eager", *make_inputs()))
    assert len(calls) == 1


def test_transposed_weights_are_views(calls):
    module = make_experts("gpt_oss")
    run(module, "moe_ops", *make_inputs())
    (_, w1, w2, *_), options = calls[0]
    assert (w1.data_ptr(), w2.data_ptr()) == (module.gate_up_proj.data_ptr(), module.down_proj.data_ptr())
    assert w1.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN) and options["gate_up_layout"] == "interleaved"


def test_experts_of_other_ranks_contribute_nothing():
    module = make_experts("qwen3_moe")
    x, ids, weights = make_inputs()
    expected = run(module, "moe_ops", x, ids, torch.where(ids == 2, 0.0, weights))
    assert (expected - run(module, "moe_ops", x, ids, weights)).abs().max() > 1e-2
    assert_close(run(module, "moe_ops", x, torch.where(ids == 2, EXPERTS, ids), weights), expected)


def test_router_weights_of_another_dtype():
    module = make_experts("qwen3_moe").bfloat16()
    x, ids, weights = make_inputs()
    got = run(module, "moe_ops", x.bfloat16(), ids, weights)
    assert got.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"w1 has dtype torch.bfloat16, expected torch.float32"):
        run(module, "moe_ops", x, ids, weights)


def tanh_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.tanh(gate) * up


class OtherGate(Qwen3MoeExperts):
    def _apply_gate(self, gate_up):
        return tanh_gate(self, gate_up)


class WrappedGate(Qwen3MoeExperts):
    # It says that it is the default one, and is not.
    @functools.wraps(Qwen3MoeExperts._apply_gate)
    def _apply_gate(self, gate_up):
        return 2 * Qwen3MoeExperts._apply_gate(self, gate_up)


class Subclass(torch.Tensor):
    """A tensor with a tensor inside, as the ones that distribute or quantise weights."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Subclass(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Subclass, lambda x: x.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


def of_class(cls):
    module = make_experts("qwen3_moe")
    module.__class__ = cls
    return module


def with_instance_gate():
    module = make_experts("qwen3_moe")
    module._apply_gate = functools.partial(tanh_gate, module)
    return module


def with_hook():
    module = make_experts("qwen3_moe")
    module.act_fn.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


def with_post_norm():
    module = make_experts("qwen3_moe")
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.RMSNorm(HIDDEN)
    return module


def with_other_order():
    module = make_experts("qwen3_moe")
    module.is_concatenated = False
    return module


def with_subclass():
    module = make_experts("qwen3_moe")
    del module.down_proj
    module.down_proj = Subclass(make_experts("qwen3_moe").down_proj.detach())
    return module


@pytest.mark.parametrize(
    "make, reason",
    (
        (lambda: of_class(OtherGate), "OtherGate._apply_gate is not known"),
        (lambda: of_class(WrappedGate), "_default_apply_gate is not known"),
        (with_instance_gate, "its gate was replaced on the instance"),
        (lambda: make_experts("qwen3_moe", hidden_act="quick_gelu"), "activation transformers.activations.QuickGELU"),
        (lambda: make_experts("qwen3_moe", hidden_act="relu2"), "activation transformers.activations.ReLUSquared"),
        (lambda: make_experts("deepseek_v4", hidden_act="gelu"), "activation transformers.activations.GELUActivation"),
        (lambda: make_experts("nemotron_h", mlp_hidden_act="gelu_new"), "NewGELUActivation without a gate"),
        (with_hook, "its act_fn has hooks"),
        (with_other_order, "is_concatenated is False"),
        (with_post_norm, "it normalises the output of each expert"),
        (with_subclass, "its weights are of a tensor subclass"),
    ),
)
def test_fallback(make, reason, calls, caplog):
    module = make()
    with caplog.at_level(logging.WARNING, "moe_ops"):
        got = [run(module, "moe_ops", *make_inputs()) for _ in range(2)]
    assert not calls
    assert torch.equal(got[0], run(module, "grouped_mm", *make_inputs()))
    assert len(caplog.records) == 1
    assert type(module).__qualname__ in caplog.text and reason in caplog.text
    with pytest.raises(ValueError, match="runs transformers' 'grouped_mm', not the op"):
        integration.plan_of(module, *make_inputs())


def test_fallback_differs_from_the_op():
    """Test_fallback's modules are ones that the op would get wrong."""
    plain = run(make_experts("qwen3_moe"), "moe_ops", *make_inputs())
    modules = [of_class(OtherGate), of_class(WrappedGate), with_instance_gate(), with_hook()]
    if "post_expert_norm" in inspect.getsource(ALL_EXPERTS_FUNCTIONS["grouped_mm"]):  # newer than transformers 5.17
        modules.append(with_post_norm())
    for module in modules:
        assert (run(module, "moe_ops", *make_inputs()) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ("Qwen3Moe", "GptOss"))
def test_compile(name):
    model = make_model(name)
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    block = model.model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 3):
            x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(3))
            got, expected = compiled(x), block(x)
            got, expected = (out[0] if isinstance(out, tuple) else out for out in (got, expected))
            assert_close(got, expected)
    assert any("fused_moe_tma" in op for op in ops)


def test_compile_fallback(caplog):
    module = of_class(OtherGate)
    module.config._experts_implementation = "moe_ops"
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    # Compiled before it ever ran: the reason is logged nevertheless.
    with caplog.at_level(logging.WARNING, "moe_ops"), torch.no_grad():
        got = compiled(*make_inputs())
    assert_close(got, run(module, "grouped_mm", *make_inputs()))
    assert [record.name for record in caplog.records].count("moe_ops") == 1
    assert "OtherGate._apply_gate is not known" in caplog.text


def test_plan_of():
    plan = integration.plan_of(make_experts("gpt_oss"), *make_inputs())
    assert (plan.path, plan.reason) == ("cpu", "the tensors are on the CPU")


def test_register_is_idempotent():
    integration.register()
    assert ALL_EXPERTS_FUNCTIONS["moe_ops"] is integration.experts_forward
    assert list(ALL_EXPERTS_FUNCTIONS.valid_keys()).count("moe_ops") == 1


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"not installed; install it: pip install 'transformers>=5\.17'"):
        integration.register()


@pytest.mark.parametrize("version, old", (("4.57.1", True), ("5.9.0", True), ("5.17.0.dev0", False), ("6.0", False)))
def test_register_checks_the_version(monkeypatch, version, old):
    monkeypatch.setattr("transformers.__version__", version)
    if not old:
        return integration.register()
    with pytest.raises(ImportError, match=rf"transformers is {version}, too old"):
        integration.register()
