"""Sizes past 2^31 and past the limits of grids, on every variant; some tokens are compared with the oracle.

About 30 GiB at most; what does not fit is skipped. One process at a time has that much: run this file by itself, with
pytest-xdist `-n 1`, as `make test` does.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from moe_ops.arguments import Arguments
from moe_ops.testing import assert_correct, poisoned_memory, random_inputs
from tests.cases import run

INT32 = 2**31
# Tokens compared with the oracle: so many at each end, and in between.
LOOKED_AT = 16

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Big:
    """A call and what makes it big.

    Attributes:
        sizes: arguments of `random_inputs`; without `num_tokens` each variant has its own number.
        gigabytes: what the call and the making of its inputs take, with something to spare.
        beyond: sizes by name, all of which are beyond `limit`.
        experts: the experts of every token, where a drawn one would seldom be far enough.
    """

    sizes: dict[str, int | str]
    gigabytes: int
    beyond: tuple[tuple[str, ...], ...]
    limit: int = INT32
    experts: tuple[int, ...] = field(default=())


# Of each, the elements of an operand (w1 and w2; act; x, rows and out) or the programs of a launch are beyond a limit.
BIG = {
    # 2^24 elements of w1 an expert: expert 128 starts at 2^31, and 256 where 32 bits begin anew.
    "weights": Big(
        {"experts": 260, "hidden": 4096, "intermediate": 2048, "top_k": 4}, 20,
        (("experts", "hidden", "intermediate", "gate_and_up"), ("experts", "hidden", "intermediate")),
        experts=(0, 128, 256, 259),
    ),
    "act": Big(
        {"num_tokens": 270_000, "experts": 4, "hidden": 16, "intermediate": 1024, "top_k": 8, "routing": "duplicates"},
        20, (("num_tokens", "top_k", "intermediate"),),
    ),
    "tokens": Big(
        {"num_tokens": 525_312, "experts": 4, "hidden": 4096, "intermediate": 16, "top_k": 1}, 45,
        (("num_tokens", "hidden"),),
    ),
    # More chunks of the sort and more row blocks of 128 than the 65,535 programs of a grid's other dimensions.
    "programs": Big(
        {"num_tokens": 525_312, "experts": 16, "hidden": 64, "intermediate": 64, "top_k": 16}, 15,
        (("num_tokens", "top_k"),), limit=65_535 * 128,
    ),
    "experts": Big({"experts": 1025, "hidden": 64, "intermediate": 64, "top_k": 1025}, 15, (("top_k",),), limit=1024),
}  # fmt: skip


def need(gigabytes: int) -> None:
    """Skips the test if it would run out of memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB, {free:.0f} GB are free")


@pytest.fixture(scope="module", params=BIG)
def big_call(request):
    """(what it is, its arguments): made once for all variants, and freed before the next."""
    big = BIG[request.param]
    need(big.gigabytes)
    sizes = {"num_tokens": 2048, **big.sizes}
    for names in big.beyond:
        size = torch.Size([{**sizes, "gate_and_up": 2}[name] for name in names]).numel()
        assert size > big.limit, names
    args = random_inputs(dtype=torch.bfloat16, device="cuda", **sizes)
    if big.experts:
        args.topk_ids = torch.tensor(big.experts, dtype=torch.int32, device="cuda").repeat(len(args.topk_ids), 1)
    return big, args


def some_tokens(args: Arguments, index) -> Arguments:
    """The call for some of the tokens."""
    names = ("hidden_states", "topk_weights", "topk_ids")
    return replace(args, **{name: getattr(args, name)[index] for name in names})


def look_at(num_tokens: int) -> torch.Tensor:
    """The first tokens, some in between, and the last, whose offsets are the largest."""
    spread = torch.linspace(0, num_tokens - 1, LOOKED_AT).long()
    ends = torch.arange(min(LOOKED_AT, num_tokens))
    return torch.cat([ends, spread, num_tokens - 1 - ends]).unique().cuda()


def test_big(big_call, case):
    big, args = big_call
    if "num_tokens" not in big.sizes:
        args = some_tokens(args, slice(case.tokens[0]))
    with case.override(), poisoned_memory():
        out = run(args)
    # A launch that silently did not happen leaves NaN.
    assert not out.isnan().any()
    index = look_at(len(out))
    assert_correct(out[index], some_tokens(args, index))


@pytest.mark.own_process
def test_routes_far_apart_in_the_result():
    """reduce_topk=False into a buffer with k outermost: k times its stride is beyond int32.

    An offset that wrapped would write anywhere: not in the process of the other tests.
    """
    num_tokens, top_k, hidden = 350_000, 8, 1024
    need(30)
    args = random_inputs(
        num_tokens=num_tokens, hidden=hidden, intermediate=16, experts=4, top_k=top_k, dtype=torch.bfloat16,
        device="cuda", routing="duplicates", reduce_topk=False,
    )  # fmt: skip
    out = torch.full((top_k, num_tokens, hidden), float("nan"), dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    assert (top_k - 1) * out.stride(1) > INT32
    torch.ops.moe_ops.fused_moe_tma_(out, **{name: getattr(args, name) for name in args.__slots__})
    assert not out.isnan().any()
    index = look_at(num_tokens)
    assert_correct(out[index], some_tokens(args, index))
