"""The routing sort on the device against its definition: one launch for few routes, three for many."""

import pytest
import torch

import moe_ops
from moe_ops.backends import routing
from moe_ops.testing import poisoned_memory


def _route(monkeypatch, small: bool, *args):
    monkeypatch.setattr(routing, "SMALL_ROUTES", 10**6 if small else 0)
    with poisoned_memory():
        return routing.sort_routes(*args)


def _ids(num_tokens, top_k, low, high, dtype=torch.int32):
    return torch.randint(low, high, (num_tokens, top_k), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("small", [True, False], ids=["one_launch", "three_launches"])
@pytest.mark.parametrize("block", [1, 3, 16, 64])
@pytest.mark.parametrize("experts", [1, 2, 3, 60, 130])
def test_agrees_with_its_definition(monkeypatch, small, block, experts):
    ids = _ids(29, 5, -1, experts + 1)
    expected = moe_ops.route(ids, experts, block)
    for got, want in zip(_route(monkeypatch, small, ids, experts, block), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("small", [True, False], ids=["one_launch", "three_launches"])
def test_definition(monkeypatch, small):
    ids = torch.tensor([[1, 0], [1, 7], [-5, 1]])
    got = _route(monkeypatch, small, ids, 2, 2)
    assert got.sorted_routes.tolist() == [1, 6, 0, 2, 5, 6, 6, 6]
    assert got.tile_experts.tolist() == [0, 1, 1, -1]
    assert got.num_padded.tolist() == [6]
    assert got.inverse.tolist() == [2, 0, 3, -1, -1, 4]


@pytest.mark.parametrize("small", [True, False], ids=["one_launch", "three_launches"])
def test_ids_are_checked_before_they_are_narrowed(monkeypatch, small):
    ids = torch.tensor([[2**32 + 1, 1, -(2**32), 2**63 - 1, -(2**63), 0]])
    assert _route(monkeypatch, small, ids, 2, 1).inverse.tolist() == [-1, 1, -1, -1, -1, 0]


@pytest.mark.parametrize("small", [True, False], ids=["one_launch", "three_launches"])
def test_expert_map(monkeypatch, small):
    ids = _ids(17, 3, -2, 9, torch.int64)
    expert_map = torch.tensor([3, -1, 0, 99, 1, 2, -7], dtype=torch.int32)
    expected = moe_ops.route(ids, 4, 16, expert_map)
    for got, want in zip(_route(monkeypatch, small, ids, 4, 16, expert_map), expected, strict=True):
        assert torch.equal(got, want)


def test_many_experts_and_more_chunks_than_one_scan_step(monkeypatch):
    monkeypatch.setattr(routing, "CHUNK", 16)
    monkeypatch.setattr(routing, "_SCAN_STEP", 16)
    ids = _ids(160, 4, -1, 1026)
    expected = moe_ops.route(ids, 1025, 2)
    for got, want in zip(_route(monkeypatch, False, ids, 1025, 2), expected, strict=True):
        assert torch.equal(got, want)


def test_no_tokens():
    got = routing.sort_routes(torch.empty(0, 4, dtype=torch.int32), 3, 16)
    assert [tensor.numel() for tensor in got] == [0, 0, 1, 0]
    assert got.num_padded.item() == 0
