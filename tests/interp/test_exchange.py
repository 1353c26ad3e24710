"""The kernels of expert parallelism in Triton's interpreter, against their definition in torch: bit for bit."""

from contextlib import nullcontext

import pytest
import torch

from moe_ops import exchange
from moe_ops.backends import exchange as backend
from moe_ops.exchange import NO_ROOM
from moe_ops.testing import poisoned_memory, sanitized
from tests.exchange import (
    FAR_ROWS,
    QUANTIZED,
    RANKS,
    TABLES,
    check_halved,
    check_packed,
    draw,
    extremes,
    pack_arguments,
    returned,
)

# The interpreter's NumPy says so of NaN and infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Columns beyond those that a program takes at once, in groups that fill no power of two.
WIDE = 2184


@pytest.mark.parametrize("capacity", [0, 3, 64])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (13, 5), (70, 8), (0, 2)])
def test_place(num_tokens, top_k, capacity):
    _, _, ids = draw(num_tokens, top_k)
    with sanitized(), poisoned_memory():
        got = backend.place_rows(ids, *TABLES, RANKS, capacity)
    for actual, expected in zip(got, exchange.place_rows(ids, *TABLES, RANKS, capacity), strict=True):
        assert actual.dtype == torch.int32 and torch.equal(actual, expected)


def test_a_token_goes_to_a_rank_once():
    ids = torch.tensor([[1, 2, 0, 5], [0, 0, 3, 9], [2**40, -1, 1, 1]])
    ranks, local, rows, counts = backend.place_rows(ids, *TABLES, RANKS, 0)
    assert ranks.tolist() == [[0, 0, 2, 0], [2, 2, 2, -1], [-1, -1, 0, 0]]
    assert local.tolist() == [[0, 1, 1, 2], [1, 1, 0, -1], [-1, -1, 0, 0]]
    assert rows.tolist() == [[0, -1, 2, -1], [3, -1, -1, -1], [-1, -1, 1, -1]] and counts.tolist() == [2, 0, 2]
    rows = backend.place_rows(ids, *TABLES, RANKS, 1)[2]
    assert rows.tolist() == [[0, -1, 2, -1], [NO_ROOM, -1, -1, -1], [-1, -1, NO_ROOM, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("capacity", [None, 0, 3, 16])
def test_pack(capacity, form, dtype):
    """All ways of laying out rows: every token once (None), uneven splits (0), room to spare and too little of it."""
    arguments = pack_arguments(capacity, form, dtype)
    # The sanitizer knows a memory by one dtype, and the words of a row are 32 bits beside values of any size.
    with sanitized() if arguments[-2].itemsize == 4 else nullcontext(), poisoned_memory():
        payload = backend.pack_rows(*arguments)
    check_packed(payload, arguments)


@pytest.mark.parametrize("form", ["plain", "group", "token"])
def test_pack_wide(form):
    """More columns than a step takes, and units past the last scale in the last one."""
    arguments = pack_arguments(3, form, torch.bfloat16, num_tokens=5, hidden=WIDE)
    with poisoned_memory():
        payload = backend.pack_rows(*arguments)
    check_packed(payload, arguments)


def test_far_apart():
    """Tokens, and rows that come back, 2^30 elements apart; only the pages that are touched take memory."""
    x, *others = pack_arguments(0, "plain", torch.bfloat16, num_tokens=3)
    far = torch.empty_strided(x.shape, (2**30, 1), dtype=x.dtype).copy_(x)
    check_packed(backend.pack_rows(far, *others), (x, *others))
    back = torch.randn(3, 40).bfloat16()
    far = torch.empty_strided(back.shape, (2**30, 1), dtype=back.dtype).copy_(back)
    expected = exchange.combine_rows(back, FAR_ROWS, 40, torch.float32)
    got = backend.combine_rows(far, FAR_ROWS, 40, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("hidden", [136, WIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine(dtype, hidden):
    back, rows = returned(dtype, hidden)
    with sanitized(), poisoned_memory():
        got = backend.combine_rows(back, rows, hidden, dtype)
    expected = exchange.combine_rows(back, rows, hidden, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert backend.combine_rows(back, rows[:0], hidden, dtype).shape == (0, hidden)


@pytest.mark.parametrize("hidden", [136, WIDE])
def test_halve(hidden):
    """All rows but some, as they are: huge and tiny ones, zeros, infinities and NaN beside numbers."""
    partial = extremes(hidden)
    for first, count in ((0, 0), (0, 2), (3, 4), (len(partial) - 1, 1), (0, len(partial))):
        with poisoned_memory():
            payload = backend.halve_rows(partial, first, count)
        check_halved(payload, exchange.halve_rows(partial, first, count), partial, first, count)


def test_halve_far_apart():
    partial = extremes(40)[:3]
    far = torch.empty_strided(partial.shape, (2**30, 1)).copy_(partial)
    check_halved(backend.halve_rows(far, 0, 0), exchange.halve_rows(partial, 0, 0), partial, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_sums_of_halves(rank, dtype):
    """Of every rank's tokens, and of rows that come back to slots."""
    generator = torch.Generator().manual_seed(rank)
    others, own = (torch.randn(n, WIDE, generator=generator) for n in (2 * 3, 3))
    back = exchange.halve_rows(others * 10.0 ** torch.arange(-3, 3)[:, None], 0, 0)
    with poisoned_memory():
        got = backend.sum_ranks(own, back, rank, dtype)
    torch.testing.assert_close(got, exchange.sum_ranks(own, back, rank, dtype), rtol=0, atol=0)
    assert backend.sum_ranks(own[:0], back[:0], rank, dtype).shape == (0, WIDE)
    partial, rows = returned(torch.float32)
    back = exchange.halve_rows(partial, 0, 0)
    with poisoned_memory():
        got = backend.combine_rows(back, rows, 136, dtype)
    torch.testing.assert_close(got, exchange.combine_rows(back, rows, 136, dtype), rtol=0, atol=0, equal_nan=True)
