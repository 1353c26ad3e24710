"""The calls that are timed: model shapes, token counts, and how the tokens are routed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.cli.formats import Format, quantized_weights

Sizes = tuple[int, int, int, int]

# (E, top_k, H, I): models people serve, and what one rank of a parallel deployment sees of them.
SHAPES: dict[str, Sizes] = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
    "deepseek-v3-ep": (32, 1, 7168, 2048),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# The largest E, top_k, H, I or M that anything here is for.
MAX_SIZE = 1 << 24
ROUTINGS = ("uniform", "zipf", "one", "sparse")

_ZIPF_EXPONENT = 1.2
_BUSY_SHARE = 5  # "sparse": one expert in so many gets all tokens
_MAX_DRAWS = 1000


def parse_shape(text: str) -> tuple[str, Sizes]:
    """(name, sizes) of a model shape's name or of "E,TOPK,H,I".

    Raises:
        ValueError: the text is neither; the message says what was expected.
    """
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"{text!r} is neither E,TOPK,H,I, four numbers above 0, nor one of {', '.join(SHAPES)}")
    if max(sizes) > MAX_SIZE:
        raise ValueError(f"{text!r} has a number above {MAX_SIZE}")
    experts, top_k, hidden, intermediate = sizes
    if top_k > experts:
        raise ValueError(f"{text!r} asks {top_k} different experts of {experts}")
    return f"E{experts}-k{top_k}-H{hidden}-I{intermediate}", sizes


def make_calls(
    sizes: Sizes,
    tokens: Sequence[int],
    routings: Sequence[str],
    dtype: torch.dtype,
    device: str,
    form: Format | None = None,
) -> Iterator[tuple[str, Arguments]]:
    """(routing, call) for every routing and token count of a shape, all over one set of weights, quantised or not."""
    weights = make_weights(sizes, dtype, device, form)
    for routing in routings:
        for count in tokens:
            yield routing, make_call(sizes, weights, count, routing, dtype, device)


def make_weights(sizes: Sizes, dtype: torch.dtype, device: str, form: Format | None = None) -> dict[str, object]:
    """Weights of a shape, and whatever else their format needs, by argument name."""
    from moe_ops.testing import random_inputs

    experts, top_k, hidden, intermediate = sizes
    if form is not None:
        return quantized_weights(form, experts, hidden, intermediate, dtype, device)
    drawn = random_inputs(
        num_tokens=1, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=dtype,
        device=device,
    )  # fmt: skip
    return {"w1": drawn.w1, "w2": drawn.w2}


def make_call(
    sizes: Sizes, weights: dict[str, object], tokens: int, routing: str, dtype: torch.dtype, device: str
) -> Arguments:
    """A call of so many tokens over weights of `make_weights`."""
    from moe_ops.testing import random_inputs

    experts, top_k, hidden, _ = sizes
    args = random_inputs(
        num_tokens=tokens, hidden=hidden, intermediate=8, experts=experts, top_k=top_k, dtype=dtype, device=device
    )  # its weights are thrown away
    return replace(args, topk_ids=draw_ids(routing, tokens, experts, top_k).int().to(device), **weights)


def draw_ids(routing: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Draws expert ids, [tokens, top_k], int64, on the CPU; no token has an expert twice.

    * "uniform" meets as many experts as can be expected: with few tokens their bytes decide.
    * "zipf" takes expert e with weight (e + 1) ** -1.2.
    * "one" sends every token to the same experts, the first slot to expert 0.
    * "sparse" leaves at least 80 % of the experts without a token, as far as top_k allows.
    """
    if routing == "one":
        return torch.arange(top_k).repeat(tokens, 1)
    if routing == "uniform":
        return _typical_ids(tokens, experts, top_k)
    generator = torch.Generator().manual_seed(0)
    if routing == "zipf":
        popularity = torch.arange(1, experts + 1, dtype=torch.float64).pow(-_ZIPF_EXPONENT)
    else:
        popularity = torch.zeros(experts, dtype=torch.float64)
        popularity[torch.randperm(experts, generator=generator)[: max(top_k, experts // _BUSY_SHARE)]] = 1
    return _distinct(popularity, tokens, top_k, generator)


def _typical_ids(tokens: int, experts: int, top_k: int) -> Tensor:
    expected = round(experts * (1 - (1 - top_k / experts) ** tokens))
    popularity = torch.ones(experts, dtype=torch.float64)
    for seed in range(_MAX_DRAWS):
        ids = _distinct(popularity, tokens, top_k, torch.Generator().manual_seed(seed))
        if ids.unique().numel() == expected:
            return ids
    raise RuntimeError(f"no routing of {tokens} tokens in {_MAX_DRAWS} meets {expected} of {experts} experts")


def _distinct(popularity: Tensor, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Experts of each token by their popularity, without replacement."""
    return torch.multinomial(popularity.expand(tokens, -1), top_k, replacement=False, generator=generator)
