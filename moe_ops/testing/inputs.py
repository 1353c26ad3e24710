"""Inputs for tests: unit scale before the activation, every kind of routing, and a case that is exact in integers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops.activations import ACTIVATIONS
from moe_ops.arguments import Arguments

ROUTINGS = ("uniform", "one_expert", "sparse", "duplicates", "zipf", "hostile")


def random_inputs(
    *,
    num_tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    routing: str = "uniform",
    bias: bool = False,
    n_major: bool = False,
    index_dtype: torch.dtype = torch.int32,
    seed: int = 0,
    **options: Any,
) -> Arguments:
    """Draws a call: x ~ N(0, 1) and w ~ N(0, 1 / K), so that activations see values of the order of 1.

    At a much smaller scale silu(g) * u is about g * u / 2, and no rule can tell gate from up.

    Args:
        num_tokens: M.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: routes per token; may exceed E.
        dtype: of hidden states and weights.
        device: where the tensors live.
        routing: one of `ROUTINGS`: "uniform" (distinct experts), "one_expert" (all routes to one), "sparse" (80 % of
            the experts get nothing), "duplicates" (one token may name an expert twice), "zipf" (skewed), "hostile"
            (uniform with a third of the ids out of range and NaN as their weights).
        bias: with biases, in float32 for w1 and in `dtype` for w2.
        n_major: weights as transposed views.
        index_dtype: of topk_ids.
        seed: of the generator.
        **options: any other argument of the op.

    Returns:
        The call's arguments.

    Raises:
        ValueError: `routing` is not one of `ROUTINGS`, or it is "hostile" with an `expert_map`, which decides anew
            which ids are out of range.

    Example:
        >>> random_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2).w1.shape
        torch.Size([4, 16, 16])
    """
    if routing == "hostile" and options.get("expert_map") is not None:
        raise ValueError("routing is 'hostile' with an expert_map, expected one of them; choose ids by hand")
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    rows = intermediate * (2 if ACTIVATIONS[options.get("activation", "silu")].gated else 1)
    w1 = torch.empty(experts, rows, hidden, dtype=dtype, device=device)
    w2 = torch.empty(experts, hidden, intermediate, dtype=dtype, device=device)
    for expert in range(experts):  # one at a time: a float32 copy of all weights may not fit
        w1[expert] = normal(rows, hidden, scale=hidden**-0.5)
        w2[expert] = normal(hidden, intermediate, scale=intermediate**-0.5)
    if n_major:
        w1, w2 = (weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in (w1, w2))
    topk_ids = _route(routing, num_tokens, experts, top_k, generator, device)
    topk_weights = torch.rand(num_tokens, top_k, generator=generator, device=device) + 0.1
    topk_weights /= topk_weights.sum(1, keepdim=True)
    if routing == "hostile":
        topk_weights[(topk_ids < 0) | (topk_ids >= experts)] = float("nan")
        if index_dtype == torch.int64:
            topk_ids = torch.where(topk_ids == 2**31 - 1, 2**32 + 1, topk_ids)
    return Arguments(
        normal(num_tokens, hidden),
        w1,
        w2,
        topk_weights,
        topk_ids.to(index_dtype),
        normal(experts, rows).float() if bias else None,
        normal(experts, hidden) if bias else None,
        **options,
    )


def _route(routing: str, num_tokens: int, experts: int, top_k: int, generator: torch.Generator, device: str) -> Tensor:
    """Expert ids [M, top_k], int64."""

    def uniform(choices: int) -> Tensor:
        if top_k > choices:
            return torch.randint(choices, (num_tokens, top_k), generator=generator, device=device)
        return torch.rand(num_tokens, choices, generator=generator, device=device).argsort(1)[:, :top_k]

    match routing:
        case "uniform":
            return uniform(experts)
        case "one_expert":
            return torch.full((num_tokens, top_k), experts - 1, device=device)
        case "sparse":
            return uniform(max(1, experts // 5)) * min(5, experts)
        case "duplicates":
            return torch.randint(experts, (num_tokens, top_k), generator=generator, device=device)
        case "zipf":
            ranks = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
            share = ranks.pow(-1.2)
            count = max(1, num_tokens * top_k)
            return torch.multinomial(share, count, replacement=True, generator=generator)[: num_tokens * top_k].view(
                num_tokens, top_k
            )
        case "hostile":
            bad = torch.tensor([-1, experts, experts + 1, -(2**31), 2**31 - 1], device=device)
            pick = torch.randint(5, (num_tokens, top_k), generator=generator, device=device)
            spoiled = torch.rand(num_tokens, top_k, generator=generator, device=device) < 1 / 3
            return torch.where(spoiled, bad[pick], uniform(experts))
    raise ValueError(f"routing is {routing!r}, expected one of {', '.join(map(repr, ROUTINGS))}")


def exact_inputs(
    *,
    num_tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Arguments:
    """Draws a "silu" call all of whose intermediate values are integers that even bfloat16 holds exactly.

    Column 0 of x is 1 and gates look at nothing else, with weight 64 or -128: silu(64) = 64 and silu(-128) = 0 in
    float32. Up and down weights are sparse and +-1, always with the last column; routing weights are powers of two. A
    lost product, a wrong row or a factor of 1.003 then changes bits.

    Args:
        num_tokens: M.
        hidden: H, at least 2.
        intermediate: I.
        experts: E.
        top_k: routes per token, at most 8.
        dtype: of hidden states and weights.
        device: where the tensors live.
        seed: of the generator.
        **options: any other argument of the op that keeps values exact.

    Returns:
        The call's arguments.

    Example:
        >>> exact_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2).hidden_states[:, 0].tolist()
        [1.0, 1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    x = integers(-4, 4, num_tokens, hidden)
    x[:, 0] = 1
    gate = torch.zeros(experts, intermediate, hidden, dtype=torch.int64)
    gate[:, :, 0] = torch.where(integers(0, 1, experts, intermediate) == 1, 64, -128)
    w1 = torch.cat([gate, _sparse_signs(integers, experts, intermediate, hidden)], 1)
    if options.get("gate_up_layout") == "interleaved":
        w1 = w1.view(experts, 2, intermediate, hidden).transpose(1, 2).reshape(experts, 2 * intermediate, hidden)
    w2 = _sparse_signs(integers, experts, hidden, intermediate)
    ids = _route("uniform", num_tokens, experts, top_k, generator, "cpu")
    weights = torch.pow(2.0, -integers(0, 3, num_tokens, top_k))
    x, w1, w2 = (tensor.to(device, dtype) for tensor in (x, w1, w2))
    return Arguments(x, w1, w2, weights.to(device), ids.int().to(device), **options)


def _sparse_signs(integers: Callable[..., Tensor], experts: int, rows: int, columns: int, nonzeros: int = 4) -> Tensor:
    """[E, rows, columns] with a few +-1 in each row, one of them in the last column."""
    weight = torch.zeros(experts, rows, columns, dtype=torch.int64)
    where = integers(0, columns - 1, experts, rows, nonzeros - 1)
    weight.scatter_(2, where, 2 * integers(0, 1, experts, rows, nonzeros - 1) - 1)
    weight[:, :, -1] = 2 * integers(0, 1, experts, rows) - 1
    return weight
