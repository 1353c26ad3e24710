"""The kernels of expert parallelism in Triton's interpreter, against their definition in torch: bit for bit."""

from contextlib import nullcontext

import pytest
import torch

from moe_ops import exchange
from moe_ops.backends import exchange as backend
from moe_ops.exchange import NO_ROOM, NOWHERE, RowLayout, read_rows
from moe_ops.testing import poisoned_memory, sanitized

# The interpreter's NumPy says so of NaN and infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EXPERTS, RANKS = 7, 3
RANK_OF = torch.tensor([2, 0, 0, 2, 2, 0, 2], dtype=torch.int32)  # rank 1 has none
LOCAL_OF = torch.tensor([1, 0, 1, 0, 2, 2, 3], dtype=torch.int32)
QUANTIZED = {"plain": (None, 0), "token": (torch.float8_e4m3fn, 1), "group": (torch.float8_e4m3fn, 2),
             "int8": (torch.int8, 2), "given": (torch.float8_e4m3fn, 2)}  # fmt: skip


def draw(num_tokens, top_k, dtype=torch.float32, hidden=136):
    generator = torch.Generator().manual_seed(num_tokens + top_k)
    ids = torch.randint(-1, EXPERTS + 1, (num_tokens, top_k), generator=generator)
    ids[::5, -1] = 2**40
    weights = torch.rand(num_tokens, top_k, generator=generator)
    weights[(ids < 0) | (ids >= EXPERTS)] = torch.nan
    return torch.randn(num_tokens, hidden, generator=generator).to(dtype), weights, ids


@pytest.mark.parametrize("capacity", [0, 3, 64])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (13, 4), (70, 8), (0, 2)])
def test_place(num_tokens, top_k, capacity):
    _, _, ids = draw(num_tokens, top_k)
    with sanitized(), poisoned_memory():
        got = backend.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, capacity)
    for actual, expected in zip(got, exchange.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, capacity), strict=True):
        assert actual.dtype == torch.int32 and torch.equal(actual, expected)


def test_a_token_goes_to_a_rank_once():
    ids = torch.tensor([[1, 2, 0, 5], [0, 0, 3, 9], [2**40, -1, 1, 1]])
    ranks, local, rows, counts = backend.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, 0)
    assert ranks.tolist() == [[0, 0, 2, 0], [2, 2, 2, -1], [-1, -1, 0, 0]]
    assert local.tolist() == [[0, 1, 1, 2], [1, 1, 0, -1], [-1, -1, 0, 0]]
    assert rows.tolist() == [[0, -1, 2, -1], [3, -1, -1, -1], [-1, -1, 1, -1]] and counts.tolist() == [2, 0, 2]
    rows = backend.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, 1)[2]
    assert rows.tolist() == [[0, -1, 2, -1], [NO_ROOM, -1, -1, -1], [-1, -1, NO_ROOM, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("capacity", [None, 0, 3, 16])
def test_pack(capacity, form, dtype):
    """All ways of laying out rows: every token once (None), uneven splits (0), room to spare and too little of it."""
    x, weights, ids = draw(13, 4, dtype)
    row_dtype, scales = QUANTIZED[form]
    scale = None
    if form == "given":
        x, scale = exchange.quantize_activations(x, row_dtype, "group")
    placed = (None,) * 3
    num_rows, bound, experts = 16, EXPERTS, ids
    if capacity is not None:
        ranks, experts, rows, counts = exchange.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, capacity)
        num_rows = RANKS * capacity if capacity else int(counts.sum())
        placed = ranks, rows, counts if capacity else None
    layout = RowLayout(x.shape[1], 4, row_dtype or dtype, scales)
    arguments = (x, scale, weights, experts, *placed, num_rows, bound, capacity or 0, layout.dtype, scales)
    # The sanitizer knows a memory by one dtype, and the words of a row are 32 bits beside values of any size.
    with sanitized() if layout.dtype.itemsize == 4 else nullcontext(), poisoned_memory():
        got = read_rows(backend.pack_rows(*arguments), layout)
    expected = read_rows(exchange.pack_rows(*arguments), layout)
    assert torch.equal(got.topk_ids, expected.topk_ids) and torch.equal(got.lost, expected.lost)
    used = (got.topk_ids != NOWHERE).any(1)
    assert used.any()
    torch.testing.assert_close(got.topk_weights[used], expected.topk_weights[used], rtol=0, atol=0, equal_nan=True)
    if scales:
        torch.testing.assert_close(got.scale[used], expected.scale[used], rtol=0, atol=0)
    ours, theirs = (rows.hidden_states[used].float() for rows in (got, expected))
    # A quotient by a reciprocal may round the other way where it is a tie.
    assert ((ours == theirs) | (ours.isnan() & theirs.isnan())).float().mean() > (0.99 if scales else 0.9999)
    torch.testing.assert_close(ours, theirs, rtol=0.13, atol=1 if row_dtype == torch.int8 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine(dtype):
    _, _, ids = draw(13, 5)
    rows = exchange.place_rows(ids, RANK_OF, LOCAL_OF, RANKS, 4)[2]
    assert (rows == NO_ROOM).any()
    back = torch.randn(RANKS * 4, 136).to(dtype)
    with sanitized(), poisoned_memory():
        got = backend.combine_rows(back, rows, dtype)
    expected = exchange.combine_rows(back, rows, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert backend.combine_rows(back, rows[:0], dtype).shape == (0, 136)
