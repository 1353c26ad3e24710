"""The cache of plans: hit for the same metadata, never stale for other metadata, options, overrides or environment."""

import pytest
import torch

from moe_ops import dispatch, plans
from moe_ops.testing import override, random_inputs

SIZES = {"num_tokens": 4, "hidden": 16, "intermediate": 8, "experts": 3, "top_k": 2}


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})


@pytest.fixture
def made(monkeypatch):
    """Counts the plans that are made."""
    calls = []
    original = dispatch.make_plan
    monkeypatch.setattr(dispatch, "make_plan", lambda *args: calls.append(args) or original(*args))
    return calls


def test_the_same_metadata_is_planned_once(made):
    first = plans.plan(random_inputs(**SIZES))
    assert plans.plan(random_inputs(**SIZES, seed=1)) is first
    assert len(made) == 1


def _wider(args):
    args.hidden_states = torch.zeros(4, 17)[:, 1:]


def _n_major(args):
    args.w1 = args.w1.transpose(1, 2).contiguous().transpose(1, 2)


def _misaligned(args):
    args.w2 = torch.zeros(args.w2.numel() + 1)[1:].view_as(args.w2)


CHANGES = {
    "more_tokens": lambda args: random_inputs(**SIZES | {"num_tokens": 5}),
    "other_dtype": lambda args: random_inputs(**SIZES, dtype=torch.bfloat16),
    "int64_ids": lambda args: setattr(args, "topk_ids", args.topk_ids.long()),
    "strides": _wider,
    "n_major": _n_major,
    "alignment": _misaligned,
    "bias": lambda args: setattr(args, "w2_bias", torch.zeros(3, 16)),
    "activation": lambda args: setattr(args, "activation", "gelu"),
    "limit": lambda args: setattr(args, "activation_limit", 2.0),
    "scale": lambda args: setattr(args, "routed_scaling_factor", 2.0),
    "path": lambda args: setattr(args, "path", "reference"),
    "out_dtype": lambda args: setattr(args, "out_dtype", torch.float16),
    "expert_map": lambda args: setattr(args, "expert_map", torch.zeros(7, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_is_planned_anew(made, name):
    args = random_inputs(**SIZES)
    plans.plan(args)
    changed = CHANGES[name](args) or args
    problem, _ = plans.plan(changed)
    assert len(made) == 2
    assert problem == made[-1][0]


def test_overrides_and_environment_are_part_of_the_key(made, monkeypatch):
    args = random_inputs(**SIZES)
    plans.plan(args)
    with override(path="reference"):
        assert plans.plan(args)[1].path == "reference"
    assert plans.plan(args)[1].path == "cpu"
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    plans.plan(args)
    assert len(made) == 3


def test_errors_are_not_kept(made):
    args = random_inputs(**SIZES)
    args.w1 = args.w1[:, :-1]
    for _ in range(2):
        with pytest.raises(ValueError, match="w1"):
            plans.plan(args)
    assert not plans._plans


def test_the_number_of_entries_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "_MAX_ENTRIES", 3)
    for num_tokens in range(1, 9):
        plans.plan(random_inputs(**SIZES | {"num_tokens": num_tokens}))
        assert len(plans._plans) <= 3
