"""Routers of transformers' models through `topk_route`, against their own forwards."""

import copy
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_ops.integrations import routers
from moe_ops.integrations import transformers as integration
from scripts import families
from tests.amount import in_full
from tests.integrations.test_families import INSTALLED, known
from tests.integrations.test_transformers import make_model

pytestmark = pytest.mark.usefixtures("registered")

# Of every formula one; the names are of packages.
QUICK = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "nemotron_h", "olmoe", "qwen3_moe")
PACKAGES = {name.split(".")[2] for name in routers._KINDS}
REST = sorted(PACKAGES - set(QUICK))


@pytest.fixture
def calls(monkeypatch):
    """The options of topk_route's calls."""
    seen, original = [], routers.topk_route
    monkeypatch.setattr(routers, "topk_route", lambda *a, **kw: seen.append(kw) or original(*a, **kw))
    return seen


def build(family):
    for cls in families.model_classes(family):
        try:
            return families.build(cls, family)
        except ValueError:  # no experts in it
            continue
    raise AssertionError(f"{family} has no model with experts")


def randomise_biases(model):
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "correction_bias" in name:
            tensor.data.uniform_(-0.3, 0.3, generator=generator)
    return model


def check(family, calls):
    model = randomise_biases(build(family))
    # Groups that matter where there are any: of half of the experts, one of two.
    for module in model.modules():
        if hasattr(module, "topk_group") and hasattr(module, "num_group"):
            module.num_group, module.topk_group, module.top_k = 2, 1, 3
    expected, state = families.outputs(model, "moe_ops"), list(model.state_dict())
    assert not calls
    fused = integration.fuse_routers(model)
    assert fused and fused == integration.fuse_routers(model) and list(model.state_dict()) == state
    got = families.outputs(model, "moe_ops")
    assert len(calls) == len(fused)
    assert families.difference(got, expected) <= families.TOLERANCE
    calls.clear()
    eager = families.outputs(model, "eager")
    assert not calls and families.difference(eager, expected) <= families.TOLERANCE


@pytest.mark.parametrize("family", QUICK)
def test_family(family, calls):
    check(family, calls)


@in_full
@pytest.mark.parametrize("family", known(REST))
def test_rest(family, calls):
    check(family, calls)


def test_deepseek_v2_without_groups(calls):
    model = build("deepseek_v2")
    for module in model.modules():
        if hasattr(module, "topk_method"):
            module.topk_method = "greedy"
    expected = families.outputs(model, "moe_ops")
    assert integration.fuse_routers(model)
    assert families.difference(families.outputs(model, "moe_ops"), expected) <= families.TOLERANCE
    assert calls and "num_groups" not in calls[0]


def test_wrong_weights_are_noticed(monkeypatch):
    """The comparison of these tests can fail."""
    model, right = build("qwen3_moe"), routers.topk_route
    expected = families.outputs(model, "moe_ops")
    monkeypatch.setattr(routers, "topk_route", lambda *a, **kw: (right(*a, **kw)[0] * 1.01, right(*a, **kw)[1]))
    integration.fuse_routers(model)
    assert families.difference(families.outputs(model, "moe_ops"), expected) > families.TOLERANCE


def test_others_stay_and_are_named(caplog):
    model = build("lfm2_moe")
    before = families.outputs(model, "moe_ops")
    with caplog.at_level(logging.WARNING, "moe_ops"):
        assert integration.fuse_routers(model) == []
    assert "Lfm2MoeTopKRouter" in caplog.text and [r.name for r in caplog.records].count("moe_ops") == 1
    assert torch.equal(families.outputs(model, "moe_ops"), before)


def test_router_of_experts_that_fall_back_stays(caplog):
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    with caplog.at_level(logging.WARNING, "moe_ops"):
        assert integration.fuse_routers(model) == ["model.layers.1.mlp.gate"]
    assert "Qwen3MoeTopKRouter" in caplog.text


def test_copies_and_repr():
    model = make_model("Qwen3Moe")
    shown = str(model)
    integration.fuse_routers(model)
    assert str(model) == shown
    copied = copy.deepcopy(model)
    router, block = copied.model.layers[0].mlp.gate, copied.model.layers[0].mlp
    assert router.experts_beside[0] is block.experts
    assert isinstance(router, type(make_model("Qwen3Moe").model.layers[0].mlp.gate))


def test_router_logits_are_recorded():
    model = make_model("Qwen3Moe")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids, output_router_logits=True).router_logits
        integration.fuse_routers(model)
        got = model(ids, output_router_logits=True).router_logits
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_ids_are_what_comes_next_can_take():
    model = make_model("Qwen3Moe")
    integration.fuse_routers(model)
    first, second = (layer.mlp for layer in model.model.layers)
    x = torch.randn(3, 32)
    assert first.gate(x)[2].dtype == torch.int32
    first.experts._is_expert_parallel = True
    second.gate.register_forward_hook(lambda module, args, out: None)
    assert first.gate(x)[2].dtype == second.gate(x)[2].dtype == torch.int64


@pytest.mark.parametrize("name", ("Qwen3Moe", "DeepseekV3"))
def test_compile(name):
    model = make_model(name)
    integration.fuse_routers(model)
    block, ops = model.model.layers[0].mlp, []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 3):
            x = torch.randn(1, tokens, 32)
            torch.testing.assert_close(compiled(x), block(x))
    assert any("topk_route" in op for op in ops)


def test_generate(calls):
    model = make_model("Qwen3Moe")
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    integration.fuse_routers(model)
    assert torch.equal(model.generate(ids, **options), expected) and calls


def test_names_are_classes():
    """Every class in the table exists, where its package does."""
    import importlib

    for name in routers._KINDS:
        package = name.split(".")[2]
        if package in INSTALLED:
            assert hasattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]), name
