"""Routers that every implementation must get right; shared by the tests of the CPU, the interpreter and the GPU."""

import torch
from torch import Tensor

from moe_ops.router import make_router, topk_route_in_torch

# (experts, top_k, options, whether there is a bias)
ROUTERS = {
    "mixtral": (8, 2, {"renormalize": True}, False),
    "qwen3": (128, 8, {"renormalize": True}, False),
    "olmoe": (64, 8, {}, False),
    "gpt_oss": (32, 4, {"scoring": "topk_softmax"}, False),
    "deepseek_v2": (160, 6, {"num_groups": 8, "topk_groups": 3, "routed_scaling_factor": 16.0}, False),
    "deepseek_v3": (
        256, 8,
        {
            "scoring": "sigmoid", "renormalize": True, "num_groups": 8, "topk_groups": 4, "group_score": "top2",
            "routed_scaling_factor": 2.5,
        },
        True,
    ),
    "sqrtsoftplus": (96, 6, {"scoring": "sqrtsoftplus", "renormalize": True}, True),
    "all_experts": (5, 5, {"scoring": "sigmoid"}, True),
    "one_expert": (1, 1, {}, False),
    "many_experts": (1000, 3, {"scoring": "topk_softmax"}, True),
    "grouped_logits": (
        48, 6, {"scoring": "topk_softmax", "num_groups": 6, "topk_groups": 3, "group_score": "top2"}, False,
    ),
    "odd_groups": (33, 4, {"num_groups": 3, "topk_groups": 2, "group_score": "top2"}, True),
}  # fmt: skip


def draw(name: str, num_tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """(logits, top_k, bias, options). Some tokens have equal logits, infinite ones, NaN among others and alone.

    Logits are multiples of 1/16: scores are the same, or more than a rounding of exp apart.
    """
    experts, top_k, options, biased = ROUTERS[name]
    generator = torch.Generator().manual_seed(experts + num_tokens)
    logits = (40 * torch.randn(num_tokens, experts, generator=generator)).clamp(-128, 128).round() / 16
    changes = (
        lambda row: row.fill_(1),
        lambda row: row.round_(),
        lambda row: row[::2].fill_(float("nan")),
        lambda row: row.fill_(float("nan")),
        lambda row: row.fill_(-float("inf")),
        lambda row: row[-1:].fill_(float("inf")),
        lambda row: row[1:].fill_(-float("inf")),
        lambda row: row.zero_()[::2].neg_(),
    )
    for row, change in zip(logits[:-1], changes, strict=False):
        change(row)
    bias = 0.1 * torch.randn(experts, generator=generator) if biased else None
    return logits.to(device, dtype), top_k, None if bias is None else bias.to(device), options


def check(weights: Tensor, ids: Tensor, logits: Tensor, top_k: int, bias: Tensor | None, options: dict) -> None:
    """Holds a result against torch's operators on the CPU: the same experts in the same order, and their weights."""
    weights, ids, logits, bias = (None if x is None else x.cpu() for x in (weights, ids, logits, bias))
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    expected, expected_ids = topk_route_in_torch(logits, bias, make_router(logits, top_k, bias, **options))
    assert torch.equal(ids, expected_ids)
    assert ((ids >= 0) & (ids < logits.shape[1])).all() and (ids.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-9, equal_nan=True)


def left_out_groups():
    """Experts of -inf in the one group that is kept, and others with lower numbers in those that are not."""
    logits = torch.full((3, 12), -float("inf"))
    logits[0, 10], logits[1, 4], logits[2, 8] = 1.0, -2.0, -200.0
    return logits, 3, None, {"scoring": "topk_softmax", "num_groups": 3}


def two_equal_best():
    """Groups whose two best are equal; by the best and the third of them, another group would be kept."""
    logits = torch.tensor([[4.0, 1, 0, 0, 3, 0, 3, 0], [-1, -1, -9, -9, 2, -9, -9, -9]])
    return logits, 2, None, {"scoring": "topk_softmax", "num_groups": 2, "group_score": "top2"}


def negative_logits():
    """Groups and experts of which the best are negative."""
    logits, *others = draw("grouped_logits", 4)
    return logits - 20, *others


def large_logits(name: str):
    """Logits whose exponential is infinite."""
    logits, *others = draw(name, 4)
    return logits + 300, *others


def very_negative_logits():
    """Logits x for which 1 + exp(x) is 1, or nearly."""
    logits = torch.tensor([[-30.0, -20.0, -10.0, -5.0, 0.0, 5.0, 30.0, 60.0]])
    return logits, 8, None, {"scoring": "sqrtsoftplus"}


# What `draw` has not: functions that return as it does.
EDGES = {
    "left out groups": left_out_groups,
    "two equal best": two_equal_best,
    "negative logits": negative_logits,
    "large logits": lambda: large_logits("qwen3"),
    "large logits of the chosen": lambda: large_logits("gpt_oss"),
    "very negative logits": very_negative_logits,
}
