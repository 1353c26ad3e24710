"""The kernels of expert parallelism on a GPU, against their definition in torch."""

import pytest
import torch

from moe_ops import exchange
from moe_ops.backends import exchange as backend
from moe_ops.testing import poisoned_memory
from tests.exchange import (
    EXPERTS,
    QUANTIZED,
    RANKS,
    TABLES,
    check_halved,
    check_packed,
    draw,
    extremes,
    pack_arguments,
)


@pytest.mark.parametrize("capacity", [0, 3, 700])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (37, 4), (1000, 8), (0, 2)])
def test_place(num_tokens, top_k, capacity):
    ids = draw(num_tokens, top_k, device="cuda")[2]
    tables = [table.cuda() for table in TABLES]
    for _ in range(2):  # compiled, and kept
        with poisoned_memory():
            got = backend.place_rows(ids, *tables, RANKS, capacity)
        for actual, expected in zip(got, exchange.place_rows(ids, *tables, RANKS, capacity), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("capacity", [None, 0, 3, 64])
def test_pack(capacity, form):
    arguments = pack_arguments(capacity, form, torch.bfloat16, num_tokens=61, hidden=2048, device="cuda")
    for _ in range(2):
        with poisoned_memory():
            payload = backend.pack_rows(*arguments)
        check_packed(payload, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine(dtype):
    ids = draw(500, 8, device="cuda")[2] % EXPERTS
    rows = exchange.place_rows(ids, *(table.cuda() for table in TABLES), RANKS, 300)[2]
    back = torch.randn(RANKS * 300, 2048, device="cuda").to(dtype)
    with poisoned_memory():
        got = backend.combine_rows(back, rows, 2048, torch.bfloat16)
    expected = exchange.combine_rows(back, rows, 2048, torch.bfloat16)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("hidden", [136, 7168])
def test_halves(hidden):
    partial = extremes(hidden).cuda()
    for first, count in ((0, 0), (3, 4)):
        with poisoned_memory():
            payload = backend.halve_rows(partial, first, count)
        check_halved(payload, exchange.halve_rows(partial, first, count), partial, first, count)
    own = torch.randn(64, hidden, device="cuda")
    back = exchange.halve_rows(torch.randn(128, hidden, device="cuda"), 0, 0)
    for rank in range(3):
        with poisoned_memory():
            got = backend.sum_ranks(own, back, rank, torch.bfloat16)
        assert torch.equal(got, exchange.sum_ranks(own, back, rank, torch.bfloat16))
