"""The adapters of peers, on the CPU: those that run there really, the others against stand-ins of their signatures."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from moe_ops.cli.peers import PEERS, Peer
from moe_ops.cli.peers.weights import interleave_gate_up
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import errors, random_inputs


def call(dtype=torch.bfloat16):
    return random_inputs(num_tokens=9, hidden=32, intermediate=16, experts=8, top_k=2, dtype=dtype, seed=3)


def assert_right(result, args):
    assert result.dtype == args.hidden_states.dtype
    assert errors(result, fused_moe_reference(args)).rms < 2 * torch.finfo(result.dtype).eps


def test_every_peer_has_an_adapter():
    for name, peer in PEERS.items():
        assert name not in ("tma", "classic")
        assert len(peer.adapter) == 2 and callable(peer.prepare)


def test_obstacles(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('no libcuda')")
    (tmp_path / "needy_peer.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    assert Peer(("grouped", "prepare")).obstacle() is None
    assert Peer(("grouped", "prepare"), ("a_peer_that_is_not_there",)).obstacle() == "not installed"
    assert Peer(("grouped", "prepare"), ("a_peer_that_is_not_there.part",)).obstacle() == "not installed"
    assert "OSError: no libcuda" in Peer(("grouped", "prepare"), ("broken_peer",)).obstacle()
    assert "a_module_that_is_not_there" in Peer(("grouped", "prepare"), ("needy_peer",)).obstacle()


@pytest.mark.parametrize("name", ["grouped_mm", "hf_eager", "hf_batched_mm", "hf_grouped_mm"])
@torch.no_grad()
def test_peers_that_run_on_a_cpu(name):
    if obstacle := PEERS[name].obstacle():
        pytest.skip(f"{name}: {obstacle}")
    args = call()
    before = args.hidden_states.clone()
    run = PEERS[name].prepare(args)
    assert_right(run(), args)
    assert torch.equal(run(), run()) and torch.equal(args.hidden_states, before)


@torch.no_grad()
def test_compiled_peer_is_compiled_for_each_call(monkeypatch):
    compiled = []

    def compile(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    for _ in range(2):
        args = call()
        assert_right(PEERS["grouped_mm_compiled"].prepare(args)(), args)
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2


def test_interleave_gate_up():
    w1 = torch.arange(2 * 6 * 3).view(2, 6, 3)
    interleaved = interleave_gate_up(w1)
    assert torch.equal(interleaved[:, ::2], w1[:, :3]) and torch.equal(interleaved[:, 1::2], w1[:, 3:])


# Stand-ins: modules by name, with the attributes that an adapter imports.


def install(monkeypatch, **modules):
    for name, attributes in modules.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or end == len(parts):
                module = ModuleType(path)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
        vars(sys.modules[".".join(parts)]).update(attributes)


def experts(x, w1, w2, topk_weights, topk_ids):
    """The formula, in float32."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token, slot in torch.ones_like(topk_ids).nonzero():
        expert = topk_ids[token, slot]
        gate, up = (w1[expert].float() @ x[token].float()).chunk(2)
        out[token] += topk_weights[token, slot] * (w2[expert].float() @ (functional.silu(gate) * up))
    return out.to(x.dtype)


def test_vllm(monkeypatch):
    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu"):
        assert not inplace
        return experts(hidden_states, w1, w2, topk_weights, topk_ids)

    install(monkeypatch, vllm__model_executor__layers__fused_moe={"fused_experts": fused_experts})
    args = call()
    assert_right(PEERS["vllm"].prepare(args)(), args)


def test_sglang(monkeypatch):
    published, stamps = [], {}

    class Config(SimpleNamespace):
        def __init__(self, num_experts=None, num_local_experts=None, inplace=True):
            super().__init__(num_experts=num_experts, num_local_experts=num_local_experts, inplace=inplace)

    def fused_experts(hidden_states, w1, w2, topk_output, moe_runner_config):
        assert published and stamps == {"tp_group": None}
        assert not moe_runner_config.inplace and moe_runner_config.num_experts == moe_runner_config.num_local_experts
        topk_weights, topk_ids, _ = topk_output
        return experts(hidden_states, w1, w2, topk_weights, topk_ids)

    context = SimpleNamespace(override_permanently=lambda **values: stamps.update(values))
    install(
        monkeypatch,
        sglang__srt__layers__moe__fused_moe_triton={"fused_experts": fused_experts},
        sglang__srt__layers__moe__moe_runner={"MoeRunnerConfig": Config},
        sglang__srt__layers__moe__topk={"StandardTopKOutput": lambda *parts: parts},
        sglang__srt__runtime_context={"get_parallel": lambda: context},
        sglang__srt__server_args={
            "ServerArgs": SimpleNamespace, "set_global_server_args_for_scheduler": published.append,
        },
    )  # fmt: skip
    args = call()
    assert_right(PEERS["sglang"].prepare(args)(), args)


def test_sonicmoe(monkeypatch):
    def moe_general_routing_inputs(x, scores, tokens, ids, w1, b1, w2, b2, E, stream_id, activation_type, inference):
        assert (b1, b2, E, stream_id, activation_type, inference) == (None, None, w2.size(-1), 7, "swiglu", True)
        assert tokens.dtype == ids.dtype == torch.int32 and torch.equal(tokens, tokens.sort().values)
        w1, w2, top_k = w1.permute(2, 0, 1), w2.permute(2, 0, 1), ids.numel() // x.shape[0]
        w1 = torch.cat([w1[:, ::2], w1[:, 1::2]], 1)
        return experts(x, w1, w2, scores.view(-1, top_k), ids.view(-1, top_k)), None

    install(
        monkeypatch,
        sonicmoe__enums={"ActivationType": SimpleNamespace(SWIGLU="swiglu")},
        sonicmoe__functional={"moe_general_routing_inputs": moe_general_routing_inputs},
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    args = call()
    assert_right(PEERS["sonicmoe"].prepare(args)(), args)
