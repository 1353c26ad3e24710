"""The router's kernel on a GPU, against torch's operators on the CPU."""

import pytest
import torch

import moe_ops
from tests.routers import EDGES, ROUTERS, check, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_kernel(name, dtype):
    for num_tokens in (1, 9, 300):
        logits, top_k, bias, options = draw(name, num_tokens, dtype, "cuda")
        result = moe_ops.topk_route(logits, top_k, bias, **options)
        check(*result, logits, top_k, bias, options)
        again = moe_ops.topk_route(logits, top_k, bias, **options)
        assert torch.equal(result[1], again[1]) and torch.equal(result[0].nan_to_num(7), again[0].nan_to_num(7))


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    logits, top_k, bias, options = EDGES[name]()
    check(*moe_ops.topk_route(logits.cuda(), top_k, bias, **options), logits, top_k, bias, options)


def test_graph_and_compile():
    logits, top_k, bias, options = draw("deepseek_v3", 64, device="cuda")
    compiled = torch.compile(lambda x: moe_ops.topk_route(x * 1, top_k, bias, **options), fullgraph=True)
    check(*compiled(logits), logits, top_k, bias, options)
    moe_ops.topk_route(logits, top_k, bias, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe_ops.topk_route(logits, top_k, bias, **options)
    logits.copy_(logits.flip(0))
    graph.replay()
    check(*result, logits, top_k, bias, options)


def test_many_tokens():
    """Rows beyond 2^31 elements of logits are read where they are."""
    logits = torch.zeros(2**20 + 3, 2048, device="cuda", dtype=torch.bfloat16)
    logits[-1, 77] = 1
    weights, ids = moe_ops.topk_route(logits, 1)
    assert ids[-1].item() == 77 and ids[:-1].eq(0).all() and not weights.isnan().any()
