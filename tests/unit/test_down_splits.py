"""K of the down GEMM in parts: when, in how many, and what memory they take."""

import pytest
import torch

from moe_ops import dispatch
from moe_ops.cli.calls import SHAPES
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import known_card
from moe_ops.cli.problems import describe_call
from moe_ops.dispatch import Override, Plan, make_plan
from moe_ops.problem import Problem

H200 = known_card("h200").device
MIXTRAL, GPT_OSS = SHAPES["mixtral-8x7b"], SHAPES["gpt-oss-20b"]


def call(sizes, tokens: int, form: str | None = "mxfp4") -> Problem:
    return describe_call(sizes, tokens, torch.bfloat16, FORMATS.get(form), "auto")


def plan(sizes, tokens: int, form: str | None = "mxfp4") -> Plan:
    return make_plan(call(sizes, tokens, form), H200)


@pytest.mark.parametrize("form", ["int4", "int4_g32", "mxfp4"])
@pytest.mark.parametrize("sizes", [MIXTRAL, GPT_OSS], ids=str)
def test_one_token_of_packed_weights(sizes, form):
    made = plan(sizes, 1, form)
    programs = made.max_tiles * -(-sizes[2] // made.down.block_n)
    assert made.splits > 1
    # As many as run at once, or nearly.
    assert 0.6 * H200.num_sms < made.splits * programs / made.down.packed_programs() <= H200.num_sms
    assert -(-sizes[3] // made.down.block_k) // made.splits >= 5


@pytest.mark.parametrize(
    ("sizes", "tokens", "form"),
    [
        (MIXTRAL, 64, "int8_weights"),  # rows enough to be worth more
        (GPT_OSS, 16, "mxfp4"),  # tiles enough
        (GPT_OSS, 4, "mxfp4"),  # as busy a multiprocessor with halves of them as with them
        ((8, 2, 1024, 1024), 2, "mxfp4"),  # steps too few
        (MIXTRAL, 2, None),
        (MIXTRAL, 4, "fp8_block"),
    ],
    ids=str,
)
def test_others_have_one_part(sizes, tokens, form):
    assert plan(sizes, tokens, form).splits == 1


@pytest.mark.parametrize("form", ["fp8_block", "fp8_channel", "int8_weights"])
def test_one_token_of_8_bits(form):
    """Half as many tiles as multiprocessors, or as many."""
    made = plan(MIXTRAL, 1, form)
    assert made.variant == "sorted" and made.splits == 4


def test_the_last_wave():
    """More tiles than programs at once, by less than half: two waves of halves and a third take less than two."""
    made = plan(MIXTRAL, 64)
    assert made.variant == "packed" and made.splits == 2


def test_batch_invariance_sums_in_one_order(monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    assert plan(MIXTRAL, 1).splits == 1


def test_forced():
    problem = call(MIXTRAL, 64)
    plans = {}
    for splits in (1, 3):
        with dispatch.override(Override(variant="sorted", splits=splits)):
            plans[splits] = make_plan(problem, H200)
    assert plans[3].splits == 3
    # In fp32, and three of them.
    rows = plans[1].max_rows * problem.hidden_size
    assert plans[3].workspace_bytes - plans[1].workspace_bytes == rows * (3 * 4 - 2)


@pytest.mark.parametrize("splits", [0, -1, 65])
def test_numbers_that_are_none(splits):
    with pytest.raises(ValueError, match=f"splits is {splits}, expected 1 to 64"):
        Override(splits=splits)


def test_only_sorted_has_parts():
    forced = Override(variant="direct", splits=2)
    with (
        dispatch.override(forced),
        pytest.raises(ValueError, match="splits is 2, but variant is 'direct'; pass variant="),
    ):
        make_plan(call(MIXTRAL, 1), H200)
