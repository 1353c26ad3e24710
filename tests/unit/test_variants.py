"""Which kernel variant runs a call, and why one cannot."""

from dataclasses import replace

import pytest
import torch

from moe_ops.dispatch import Override, make_plan, override
from moe_ops.tuning.heuristics import row_group
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.variants import blockscaled_tiles, mixed_tiles, pingpong_tiles
from tests.unit.test_dispatch import A100, B200, H200, INTERPRETER, problem


def variants(tokens, device=H200, **options):
    return [make_plan(problem(m=m, e=8, top_k=1, **options), device).variant for m in tokens]


def test_variants_follow_the_rows_of_an_expert():
    for i in (256, 1024):
        assert variants((1, 64, 512, 520, 1 << 16), i=i) == ["direct", "sorted", "sorted", "pingpong", "pingpong"]


@pytest.mark.parametrize(
    "programs,group", [(132, 22), (114, 19), (78, 13), (144, 24), (113, 21), (127, 23), (2, 2), (1, 2)]
)
def test_row_groups(programs, group):
    """Near twice the root of the number of programs, and a divisor of it where there is one near."""
    assert row_group(programs) == group


def test_tiles_of_pingpong_follow_the_device():
    def groups(m, i, num_sms):
        plan = make_plan(problem(m=m, e=8, top_k=1, i=i), replace(H200, num_sms=num_sms))
        assert plan.variant == "pingpong"
        return plan.up.group_m, plan.down.group_m

    assert groups(4096, 2048, 132) == (22, 22)
    assert groups(4096, 2048, 78) == (13, 13)
    # A short reduction, and few rows.
    assert groups(4096, 768, 132) == (22, 16)
    assert groups(1024, 2048, 132) == (16, 16)


@pytest.mark.parametrize(("tiles", "group"), [(pingpong_tiles, 16), (blockscaled_tiles, 16), (mixed_tiles, 8)])
def test_columns_of_an_expert_side_by_side(tiles, group):
    """With a row block an expert, unless there are too many columns."""

    def groups(rows, i):
        return tuple(tile.group_m for tile in tiles(problem(m=8 * rows, e=8, top_k=1, i=i)))

    assert groups(48, 2048) == (1, 1)
    assert groups(49, 2048) == (group, group)
    assert groups(48, 14336) == (group, 1)


@pytest.mark.parametrize(("i", "stages"), [(64, 4), (256, 4), (320, 5), (2048, 5)])
def test_stages_of_pingpong(i, stages):
    """One less where a ring has a whole tile in it; the other is allowed all the same."""
    call = problem(m=4096, h=1024, e=8, top_k=1, i=i)
    plan = make_plan(call, H200)
    assert (plan.variant, plan.up.num_stages, plan.down.num_stages) == ("pingpong", 5, stages)
    five, six = (
        tuned_obstacle(call, H200, "tma", "pingpong", plan.up, replace(plan.down, num_stages=number))
        for number in (5, 6)
    )
    assert five is None and "has room for 3 to 5" in six


@pytest.mark.parametrize("name", ["int4_w4a16", "mxfp4_w4a16", "int8_w8a16"])
def test_one_token_of_quantised_weights(name):
    """Making numbers sets the pace of matrix-vector products, and where "packed" runs, it makes them faster."""

    def variant(device, i):
        each, group = (1, 32) if name == "int8_w8a16" else (2, 32)
        dtype = torch.int8 if name == "int8_w8a16" else torch.uint8
        weights = [torch.empty(8, n, k // each, dtype=dtype, device="meta") for n, k in ((2 * i, 1024), (1024, i))]
        scale = torch.uint8 if name == "mxfp4_w4a16" else torch.float32
        scales = [torch.empty(*w.shape[:2], w.shape[2] * each // group, dtype=scale, device="meta") for w in weights]
        call = problem(1, 1024, i, 8, 8, torch.bfloat16, *weights, w1_scale=scales[0], w2_scale=scales[1],
                       quantization=name, block_shape=(0, group) if name != "mxfp4_w4a16" else None)  # fmt: skip
        return make_plan(call, device).variant

    few, some, many = 512, 2304, 3072
    assert [variant(A100, i) for i in (few, some, many)] == ["direct", "direct", "sorted"]
    theirs = ["direct", "sorted"] if name == "int8_w8a16" else ["packed", "packed"]
    assert [variant(H200, i) for i in (few, some, many)] == ["direct", *theirs]


def test_pingpong_is_for_hopper_and_tma():
    assert variants((1 << 16,), B200) == variants((1 << 16,), A100) == ["sorted"]
    assert variants((1 << 16,), path="classic") == ["sorted"]
    assert variants((1 << 16,), h=1004) == ["sorted"]


def test_batch_invariance_asks_for_one_variant(monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    assert set(variants((1, 64, 1 << 16), i=1024)) == {"sorted"}


@pytest.mark.parametrize(
    "device,options,words",
    [
        (B200, {}, "compute capability 10.0"),
        (A100, {"path": "classic"}, "TMA path"),
        (INTERPRETER, {"path": "tma"}, "moe_ops.testing.hopper"),
    ],
    ids=["B200", "classic", "interpreter"],
)
def test_a_variant_that_cannot_run_says_why(device, options, words):
    with override(Override(variant="pingpong")), pytest.raises(ValueError, match=words):
        make_plan(problem(m=4096, **options), device)
