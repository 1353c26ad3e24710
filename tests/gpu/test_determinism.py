"""Bit for bit: a token's result does not depend on its batch, nor on what other tokens and experts are made of."""

import time
from dataclasses import replace

import pytest
import torch

from moe_ops.arguments import Arguments
from moe_ops.testing import random_inputs
from tests.cases import run
from tests.gpu.repeats import SHAPES

BATCH = 4096
PATHS = pytest.mark.parametrize("path", ["classic", "tma"])
MODEL = {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8, "dtype": torch.bfloat16}


def tokens(args: Arguments, index: slice) -> Arguments:
    """The call for some of the tokens."""
    names = ("hidden_states", "topk_weights", "topk_ids")
    return replace(args, **{name: getattr(args, name)[index] for name in names})


@PATHS
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("shape", SHAPES, ids=["whole", "tails"])
def test_batch_invariance(shape, routing, path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    args = random_inputs(num_tokens=BATCH, experts=16, top_k=4, routing=routing, device="cuda", **shape)
    full = run(args, path=path)
    for size in (1, 2, 7, 64, BATCH):
        # From the start, from within and to the end: in the full batch tokens then lie in other rows of a tile.
        for first in {0, 1000 % (BATCH - size + 1), BATCH - size}:
            mine = slice(first, first + size)
            assert torch.equal(run(tokens(args, mine), path=path), full[mine]), f"{size} tokens from {first} on"


def test_price_of_batch_invariance(monkeypatch, capsys):
    """Prints it; no bound, since clocks vary and the other tests of a session may share the device."""

    def microseconds(args, calls=100):
        run(args)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run(args)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls * 1e6

    args = random_inputs(num_tokens=BATCH, device="cuda", **MODEL)
    lines = []
    for size in (1, 64, 512, BATCH):
        few, times = tokens(args, slice(size)), []
        for value in ("0", "1"):
            monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", value)
            times.append(microseconds(few))
        default, invariant = times
        lines.append(f"{size:5} tokens: {default:7.0f} us, invariant {invariant:7.0f} us, {invariant / default:.2f} x")
    with capsys.disabled():
        print("\nbatch invariance, E=128 top_k=8 H=2048 I=768 bf16, eager:", *lines, sep="\n")


def hostile_call(case, shape_index: int) -> Arguments:
    """A case's call; with rows to compare with, where the case has one or a few tokens."""
    num_tokens = max(16, case.tokens[shape_index])
    return random_inputs(num_tokens=num_tokens, experts=16, top_k=4, device="cuda", **SHAPES[shape_index])


HOSTILE = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf"), "huge": 65504.0, "tiny": 1e-38}


@pytest.mark.parametrize("shape_index", [0, 1], ids=["whole", "tails"])
def test_hostile_rows(case, shape_index):
    args = hostile_call(case, shape_index)
    spoiled = replace(args, hidden_states=args.hidden_states.clone())
    last = len(args.hidden_states) - 1
    # Side by side and at both ends.
    rows = dict(zip((0, 1, last // 2, last - 1, last), HOSTILE, strict=True))
    for row, name in rows.items():
        spoiled.hidden_states[row] = HOSTILE[name]
    with case.override():
        clean, out = run(args), run(spoiled)
    rest = torch.ones(last + 1, dtype=torch.bool, device="cuda")
    rest[list(rows)] = False
    assert torch.equal(out[rest], clean[rest])
    for row, name in rows.items():
        assert not torch.equal(out[row], clean[row]), name
        if name == "nan":
            assert out[row].isnan().all()
        if name == "tiny":
            assert out[row].isfinite().all()


@pytest.mark.parametrize("shape_index", [0, 1], ids=["whole", "tails"])
def test_one_expert_of_nan(case, shape_index):
    args = hostile_call(case, shape_index)
    expert = args.topk_ids[0, 0].item()
    spoiled = replace(args, w1=args.w1.clone(), w2=args.w2.clone())
    spoiled.w1[expert] = spoiled.w2[expert] = float("nan")
    with case.override():
        clean, out = run(args), run(spoiled)
    reached = (args.topk_ids == expert).any(1)
    assert not reached.all()
    assert out[reached].isnan().all()
    assert torch.equal(out[~reached], clean[~reached])
