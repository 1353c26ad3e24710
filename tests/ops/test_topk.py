"""`topk_route` as PyTorch sees it, and against the routers of transformers; on the CPU."""

import pytest
import torch
from torch.library import opcheck

import moe_ops
from tests.routers import ROUTERS, check, draw

OP = torch.ops.moe_ops.topk_route.default


@pytest.mark.parametrize("name", ROUTERS)
def test_op(name):
    logits, top_k, bias, options = draw(name, 12)
    check(*moe_ops.topk_route(logits, top_k, bias, **options), logits, top_k, bias, options)
    # Of the last tokens, which have no NaN: opcheck takes one for another result.
    opcheck(OP, (logits[9:], top_k, bias), options)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    weights, ids = moe_ops.topk_route(torch.randn(num_tokens, 8), 3)
    assert weights.shape == ids.shape == (num_tokens, 3)


def test_equal_logits_and_nan():
    logits = torch.tensor([[2.0, 5.0, 5.0, 1.0], [float("nan"), 5.0, float("nan"), 1.0]])
    assert moe_ops.topk_route(logits, 3, scoring="sigmoid")[1].tolist() == [[1, 2, 0], [1, 3, 0]]
    # No group is better than another, and no NaN as good as an expert.
    ids = moe_ops.topk_route(logits[:1] * 0, 2, scoring="sigmoid", num_groups=2, topk_groups=1)[1]
    assert ids.tolist() == [[0, 1]]


def test_left_out_groups_stay_out():
    """Also where all that is left has the least score there is."""
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, -1.0, -1.0, -1.0]])
    _, ids = moe_ops.topk_route(logits, 3, scoring="topk_softmax", num_groups=2, topk_groups=1)
    assert ids.tolist() == [[0, 1, 2]]


def test_compile_and_export():
    logits, top_k, bias, options = draw("deepseek_v3", 12)

    def function(logits):
        return moe_ops.topk_route(logits * 1, top_k, bias, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (12, 3, 1):
        for got, expected in zip(compiled(logits[:num_tokens]), function(logits[:num_tokens]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    class Router(torch.nn.Module):
        def forward(self, logits):
            return function(logits)

    program = torch.export.export(Router(), (logits,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    check(*program.module()(logits[:7]), logits[:7], top_k, bias, options)


def test_no_backward():
    logits = torch.randn(3, 8, requires_grad=True)
    weights, ids = moe_ops.topk_route(logits, 2)
    assert weights.requires_grad and not ids.requires_grad
    with pytest.raises(NotImplementedError, match=r"no backward.*no_grad"):
        weights.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(8)}, ValueError, ("logits has shape [8]", "[M, E]")),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, ("logits has dtype torch.float64", "cast it")),
        ({"logits": torch.zeros(2, 5000)}, ValueError, ("logits has shape [2, 5000]", "4096")),
        ({"logits": torch.zeros(2, 0)}, ValueError, ("logits has shape [2, 0]",)),
        ({"top_k": 0}, ValueError, ("top_k is 0", "1 to 4")),
        ({"top_k": 5}, ValueError, ("top_k is 5", "1 to 4", "1 group(s) of 4")),
        ({"correction_bias": torch.zeros(7)}, ValueError, ("correction_bias has shape [7]", "[8]")),
        ({"correction_bias": torch.zeros(8).long()}, TypeError, ("correction_bias has dtype torch.int64",)),
        ({"correction_bias": torch.zeros(8, device="meta")}, ValueError, ("correction_bias is on meta", "move one")),
        ({"scoring": "tanh"}, ValueError, ("scoring is 'tanh'", "'sqrtsoftplus'")),
        ({"num_groups": 3}, ValueError, ("num_groups is 3", "divisor of the 8 experts")),
        ({"num_groups": 0}, ValueError, ("num_groups is 0",)),
        ({"topk_groups": 3}, ValueError, ("topk_groups is 3", "1 to num_groups = 2")),
        ({"group_score": "sum"}, ValueError, ("group_score is 'sum'", "'top2'")),
        ({"group_score": "top2", "num_groups": 8, "top_k": 1}, ValueError, ("group_score is 'top2'", "'max'")),
        ({"routed_scaling_factor": float("nan")}, ValueError, ("routed_scaling_factor is nan",)),
    ],
)
def test_errors(change, error, words):
    call = {"logits": torch.zeros(2, 8), "top_k": 2, "correction_bias": None, "num_groups": 2, **change}
    with pytest.raises(error) as raised:
        moe_ops.topk_route(**call)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_deepseek_v3_of_transformers(bias):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(
        hidden_size=16, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=bias)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 16))
        got = moe_ops.topk_route(
            logits, 4, router.e_score_correction_bias, scoring="sigmoid", renormalize=True, num_groups=4,
            topk_groups=2, group_score="top2", routed_scaling_factor=2.5,
        )  # fmt: skip
    assert_same_choice(got, weights, ids)


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen3_of_transformers(renormalize):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = transformers.Qwen3MoeConfig(
        hidden_size=16, num_experts=32, num_experts_per_tok=4, norm_topk_prob=renormalize
    )
    router = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 16))
    assert_same_choice(moe_ops.topk_route(logits.detach(), 4, renormalize=renormalize), weights, ids)


def test_gpt_oss_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    router = GptOssTopKRouter(transformers.GptOssConfig(hidden_size=16, num_local_experts=32, num_experts_per_tok=4))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 16))
    assert_same_choice(moe_ops.topk_route(logits.detach(), 4, scoring="topk_softmax"), weights, ids)


def assert_same_choice(got, weights, ids) -> None:
    """The same experts with the same weights, whatever their order: that of an unsorted topk is its own."""
    order, expected = got[1].long().sort(-1), ids.sort(-1)
    assert torch.equal(order.values, expected.values)
    torch.testing.assert_close(got[0].gather(1, order.indices), weights.gather(1, expected.indices))
