"""The router's kernel in Triton's interpreter, against torch's operators."""

import pytest
import torch

from moe_ops.backends.topk import topk_route
from moe_ops.router import make_router
from tests.routers import EDGES, ROUTERS, check, draw

# The interpreter's NumPy says so of NaN and infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_kernel(name, dtype):
    logits, top_k, bias, options = draw(name, 12, dtype)
    weights, ids = topk_route(logits, bias, make_router(logits, top_k, bias, **options))
    check(weights, ids, logits, top_k, bias, options)


def test_strides():
    logits, top_k, bias, options = draw("deepseek_v3", 5)
    for strided in (logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :256]):
        weights, ids = topk_route(strided, bias, make_router(strided, top_k, bias, **options))
        check(weights, ids, logits, top_k, bias, options)


def test_no_tokens():
    logits = torch.empty(0, 8)
    weights, ids = topk_route(logits, None, make_router(logits, 2))
    assert weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    logits, top_k, bias, options = EDGES[name]()
    weights, ids = topk_route(logits, bias, make_router(logits, top_k, bias, **options))
    check(weights, ids, logits, top_k, bias, options)


def test_rows_far_apart():
    """2^30 elements: the third row lies beyond int32; only the pages that are touched take memory."""
    logits, top_k, bias, options = draw("mixtral", 3, torch.bfloat16)
    far = torch.empty_strided(logits.shape, (2**30, 1), dtype=logits.dtype).copy_(logits)
    weights, ids = topk_route(far, bias, make_router(far, top_k, bias, **options))
    check(weights, ids, logits, top_k, bias, options)


def test_log1p_of_small_numbers():
    """Scores of very negative logits are exp(x / 2), and not the root of what rounding left of 1 + exp(x)."""
    logits, top_k, bias, options = EDGES["very negative logits"]()
    weights, ids = topk_route(logits, bias, make_router(logits, top_k, bias, **options))
    expected = torch.log1p(logits.double().exp()).sqrt().sort(descending=True).values
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    assert ids.tolist() == [list(range(7, -1, -1))]
