"""transformers' expert parallelism on 2 ranks: a tiny random model, its experts sharded by the library's own plan."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed.expert_parallel import apply_expert_parallelism

import moe_ops.integrations.transformers
from moe_ops.integrations import expert_parallel
from moe_ops.integrations.transformers import NAME
from tests.distributed.calls import Cases

moe_ops.integrations.transformers.register()
PLAN = {"gate_up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}
CASES = Cases()


def _model(implementation=None, mesh=None, shared=False):
    """The same model on every rank; with an implementation its experts are sharded over `mesh`."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=NAME).eval()
    if implementation is not None:
        experts = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
        plan = {f"{name}.{part}".rstrip("."): style for name in experts for part, style in PLAN.items()}
        tensor_parallel = mesh["ep"] if shared else mesh["tp"]
        apply_expert_parallelism(model, mesh["ep"], tensor_parallel, plan, implementation)
        assert model.model.layers[0].mlp.experts.gate_up_proj.to_local().shape[0] == 2
    return model


@torch.no_grad()
def _compare(me, ids, implementation, shared):
    mesh = init_device_mesh("cpu", (me.size, 1), mesh_dim_names=("ep", "tp"))
    got = _model(implementation, mesh, shared)(ids).logits
    torch.testing.assert_close(got, _model()(ids).logits, rtol=1e-4, atol=1e-5)


@CASES
def sentinel_ids(me):
    """Ranks that share a batch: an expert elsewhere has an id that is no expert's."""
    _compare(me, torch.arange(7)[None], "all_reduce", shared=True)


@CASES
def own_batches(me):
    """Ranks with batches of their own, of different sizes: tokens sent by transformers, and by the op."""
    for name in ("all_to_all", NAME):
        _compare(me, torch.arange(5 + me.rank)[None] + 9 * me.rank, name, shared=False)


@CASES
def shared_batch(me):
    """Ranks that share a batch of a size that they cannot halve."""
    for ids in (torch.arange(7)[None], torch.tensor([[3]])):
        _compare(me, ids, NAME, shared=True)


@CASES
def unknown_experts(me):
    """Experts that the op does not have go by transformers' own, and the log says so, once."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    expert_parallel.LOGGER.addHandler(handler)
    mesh = init_device_mesh("cpu", (me.size, 1), mesh_dim_names=("ep", "tp"))
    whole, sharded = _model(), _model(NAME, mesh)
    for model in (whole, sharded):
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = torch.nn.Mish()
    with torch.no_grad():
        for _ in range(2):
            ids = torch.arange(4)[None] + me.rank
            torch.testing.assert_close(sharded(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert sum("instead of the op across ranks" in message for message in messages) == 2  # of each layer
