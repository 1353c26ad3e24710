"""Rows of expert parallelism that every implementation must pack alike; shared by the interpreter and the GPU tests."""

import torch

from moe_ops import exchange
from moe_ops.exchange import NO_ROOM, NOWHERE, RowLayout, read_rows

EXPERTS, RANKS = 7, 3
RANK_OF = torch.tensor([2, 0, 0, 2, 2, 0, 2], dtype=torch.int32)  # rank 1 has none
LOCAL_OF = torch.tensor([1, 0, 1, 0, 2, 2, 3], dtype=torch.int32)
TABLES = RANK_OF, LOCAL_OF
QUANTIZED = {"plain": (None, 0), "token": (torch.float8_e4m3fn, 1), "group": (torch.float8_e4m3fn, 2),
             "int8": (torch.int8, 2), "given": (torch.float8_e4m3fn, 2)}  # fmt: skip


def draw(num_tokens, top_k, dtype=torch.float32, hidden=136, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens + top_k)
    ids = torch.randint(-1, EXPERTS + 1, (num_tokens, top_k), generator=generator)
    ids[::5, -1] = 2**40
    weights = torch.rand(num_tokens, top_k, generator=generator)
    weights[(ids < 0) | (ids >= EXPERTS)] = torch.nan
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    return x.to(device), weights.to(device), ids.to(device)


def pack_arguments(capacity, form, dtype, num_tokens=13, hidden=136, device="cpu"):
    """Arguments of `pack_rows` for a way of laying out rows: every token once (None), uneven splits (0), or even."""
    x, weights, ids = draw(num_tokens, 5, dtype, hidden, device)
    row_dtype, scales = QUANTIZED[form]
    scales = exchange.scales_of(hidden, True) if scales > 1 else scales
    scale = None
    if form == "given":
        x, scale = exchange.quantize_activations(x, row_dtype, "group")
    placed = (None,) * 3
    num_rows, bound, experts = num_tokens + 3, EXPERTS, ids
    if capacity is not None:
        ranks, experts, rows, counts = exchange.place_rows(ids, *(t.to(device) for t in TABLES), RANKS, capacity)
        num_rows = RANKS * capacity if capacity else int(counts.sum())
        placed = ranks, rows, counts if capacity else None
    return x, scale, weights, experts, *placed, num_rows, bound, capacity or 0, row_dtype or dtype, scales


# Rows of two tokens among three that come back.
FAR_ROWS = torch.tensor([[2, -1, 0], [1, 2, -1]], dtype=torch.int32)


def returned(dtype, hidden=136):
    """(rows that come back, rows of each token) for `combine_rows`: some slots have no row, others found no room."""
    rows = exchange.place_rows(draw(13, 5)[2], *TABLES, RANKS, 4)[2]
    assert (rows == NO_ROOM).any() and (rows == NOWHERE).any()
    back = torch.randn(RANKS * 4, hidden, generator=torch.Generator().manual_seed(hidden)).to(dtype)
    return back, rows


def check_packed(payload, arguments):
    """Holds packed rows against the definition: bit for bit, but for the ties of a quotient."""
    x, dtype, scales = arguments[0], *arguments[-2:]
    layout = RowLayout(x.shape[1], arguments[3].shape[1], dtype, scales)
    got, expected = read_rows(payload, layout), read_rows(exchange.pack_rows(*arguments), layout)
    assert torch.equal(got.topk_ids, expected.topk_ids) and torch.equal(got.lost, expected.lost)
    used = (got.topk_ids != NOWHERE).any(1)
    assert used.any()
    torch.testing.assert_close(got.topk_weights[used], expected.topk_weights[used], rtol=0, atol=0, equal_nan=True)
    if scales:
        # On a GPU torch divides by a number by multiplying with its reciprocal.
        rtol = 2e-7 if x.is_cuda else 0
        torch.testing.assert_close(got.scale[used], expected.scale[used], rtol=rtol, atol=0)
    ours, theirs = (rows.hidden_states[used].float() for rows in (got, expected))
    # A quotient by a reciprocal may round the other way where it is a tie.
    assert ((ours == theirs) | (ours.isnan() & theirs.isnan())).float().mean() > (0.99 if scales else 0.9999)
    torch.testing.assert_close(ours, theirs, rtol=0.13, atol=1 if dtype == torch.int8 else 0)


def extremes(hidden):
    """Partial sums of every size, with what has no size among them."""
    rows = torch.randn(9, hidden, generator=torch.Generator().manual_seed(hidden))
    rows *= torch.tensor([1.0, 1e-30, 1e30, 3e4, 1e-3, 0.0, 1.0, 1.0, 1e-44])[:, None]
    rows[2, 0] = torch.finfo(torch.float32).max
    rows[3] = 2.0 ** torch.arange(hidden).remainder(40).float()
    rows[6, ::3] = torch.inf
    rows[7, 1::3], rows[7, 2] = torch.nan, -torch.inf
    return rows


def check_halved(payload, expected, partial, first, count):
    """Holds rows against the definition, bit for bit, and against the 32-bit ones: 11 bits, or 2^-39 of the largest."""
    hidden = partial.shape[1]
    kept = torch.cat([partial[:first], partial[first + count :]])
    assert payload.shape == expected.shape and payload.shape[0] == kept.shape[0]
    for got, right in zip(exchange.read_halves(payload, hidden), exchange.read_halves(expected, hidden), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)
    values, scale = exchange.read_halves(payload, hidden)
    back, kept = values.double() * scale.double()[:, None], kept.double()
    finite = kept.isfinite()
    assert torch.equal(back[kept.isinf()], kept[kept.isinf()]) and back[kept.isnan()].isnan().all()
    largest = torch.where(finite, kept.abs(), 0).amax(1, keepdim=True)
    allowed = torch.maximum(kept.abs() * 2.0**-11, (largest * 2.0**-38).clamp(min=2.0**-151))
    assert ((back - kept).abs() <= allowed)[finite].all()
