"""From a router's logits to weights and experts: the arguments of `moe_ops.topk_route`, and its formula in torch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops.checks import require, require_dtype, require_name, require_ndim, require_shape

SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2")
# Keeps a sum of weights that all underflowed from being divided by; no other sum is changed by it.
EPSILON = 1e-20
# A row of scores and its keys have to fit the registers of a warp group.
MOST_EXPERTS = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Router:
    """How experts are chosen; the attributes are the arguments of `moe_ops.topk_route`."""

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0


def make_router(
    logits: Tensor,
    top_k: int,
    correction_bias: Tensor | None = None,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    routed_scaling_factor: float = 1.0,
) -> Router:
    """Checks a call of `moe_ops.topk_route`.

    Raises:
        ValueError: a shape, size, name or device is wrong.
        TypeError: a dtype is wrong.
    """
    require_ndim("logits", logits, "[M, E]")
    require_dtype("logits", logits, _DTYPES)
    num_experts = logits.shape[1]
    require(
        1 <= num_experts <= MOST_EXPERTS,
        lambda: f"logits has shape {list(logits.shape)}, expected 1 to {MOST_EXPERTS} experts in [M, E]",
    )
    require_name("scoring", scoring, SCORINGS)
    require_name("group_score", group_score, GROUP_SCORES)
    require(
        num_groups >= 1 and num_experts % num_groups == 0,
        lambda: f"num_groups is {num_groups}, expected a divisor of the {num_experts} experts of logits",
    )
    require(
        1 <= topk_groups <= num_groups, lambda: f"topk_groups is {topk_groups}, expected 1 to num_groups = {num_groups}"
    )
    size = num_experts // num_groups
    require(
        1 <= top_k <= topk_groups * size,
        lambda: (
            f"top_k is {top_k}, expected 1 to {topk_groups * size}, the experts of {topk_groups} group(s) of {size}"
        ),
    )
    if group_score == "top2" and num_groups > 1 and size < 2:
        raise ValueError("group_score is 'top2', but a group has one expert; use group_score='max'")
    if correction_bias is not None:
        require_shape("correction_bias", correction_bias, (num_experts,), "[E]")
        require_dtype("correction_bias", correction_bias, _DTYPES)
        if correction_bias.device != logits.device:
            raise ValueError(
                f"correction_bias is on {correction_bias.device} and logits on {logits.device}; move one to the other"
            )
    if not math.isfinite(routed_scaling_factor):
        raise ValueError(f"routed_scaling_factor is {routed_scaling_factor}, expected a finite number")
    return Router(num_experts, top_k, scoring, renormalize, num_groups, topk_groups, group_score, routed_scaling_factor)


def empty_choice(logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Tensors for the result: weights and ids."""
    size = (logits.shape[0], router.top_k)
    return logits.new_empty(size, dtype=torch.float32), logits.new_empty(size, dtype=torch.int32)


def topk_route_in_torch(logits: Tensor, correction_bias: Tensor | None, router: Router) -> tuple[Tensor, Tensor]:
    """(weights, ids) by torch's own operators: the CPU's kernel, and what the other one is held against."""
    logits = logits.float()
    if router.scoring == "softmax":
        scores = logits.softmax(-1)
    elif router.scoring == "sigmoid":
        scores = logits.sigmoid()
    elif router.scoring == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits).sqrt()
    else:
        scores = logits
    choice = scores if correction_bias is None else scores + correction_bias.float()
    choice = choice.masked_fill(choice.isnan(), -math.inf)
    ids = _ranked(choice)
    if router.topk_groups < router.num_groups:
        groups = choice.view(len(choice), router.num_groups, -1)
        best = groups.topk(1 if router.group_score == "max" else 2).values.sum(-1)
        best = best.masked_fill(best.isnan(), -math.inf)
        left_out = torch.ones_like(best, dtype=torch.bool)
        left_out.scatter_(1, _ranked(best)[:, : router.topk_groups], False)
        left_out = left_out.repeat_interleave(groups.shape[2], 1)
        # Behind all others, those of -inf too, and otherwise in the order that there was.
        ids = ids.gather(1, left_out.gather(1, ids).sort(stable=True, dim=-1).indices)
    ids = ids[:, : router.top_k]
    weights = scores.gather(1, ids)
    if router.scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif router.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    return weights * router.routed_scaling_factor, ids.int()


def _ranked(choice: Tensor) -> Tensor:
    """Indices from the largest to the smallest; of equal ones the lower first."""
    return choice.sort(stable=True, dim=-1, descending=True).indices
