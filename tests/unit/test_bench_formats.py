"""`python -m moe_ops bench --format`: calls in every format, their check, and what recorded peers they have."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ops.cli import harness
from moe_ops.cli.calls import make_calls
from moe_ops.cli.check import prepare_check
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.limits import Rates, Work, stage_report, work_of
from moe_ops.cli.measure import own_call
from moe_ops.cli.recorded import best_recorded, load_peers
from moe_ops.problem import make_problem
from moe_ops.reference import expert_weight
from moe_ops.testing import emulate

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SIZES = (5, 2, 320, 192)


def call(name, tokens=9, sizes=SIZES, dtype=torch.bfloat16):
    return next(make_calls(sizes, (tokens,), ("uniform",), dtype, "cpu", FORMATS[name]))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_calls_in_a_format(name, dtype):
    experts, _, hidden, intermediate = SIZES
    calls = [args for _, args in make_calls(SIZES, (1, 9), ("uniform",), dtype, "cpu", FORMATS[name])]
    assert len({args.w1.data_ptr() for args in calls}) == 1
    args = calls[1]
    assert (args.a1_scale is None) == (args.a2_scale is None) == (name != "fp8_tensor_static")
    problem = make_problem(args)
    assert (problem.intermediate_size, problem.hidden_size, problem.num_experts) == (intermediate, hidden, experts)
    w1, w2 = (
        torch.stack([expert_weight(args, problem, which, expert, torch.float32) for expert in range(experts)])
        for which in ("w1", "w2")
    )
    # N(0, 1 / K), and no two experts alike.
    assert w1.shape == (experts, 2 * intermediate, hidden) and w2.shape == (experts, hidden, intermediate)
    assert w1.std() == pytest.approx(hidden**-0.5, rel=0.05) and w2.std() == pytest.approx(intermediate**-0.5, rel=0.05)
    assert all((w1[e] != w1[0]).any() and (w2[e] != w2[0]).any() for e in range(1, experts))
    out = emulate(args).float()
    assert out.isfinite().all() and 0.1 < out.std() < 2


def test_experts_are_one_moved_on():
    args = call("int8_channel", sizes=(4, 2, 128, 64))
    assert torch.equal(args.w1[1], args.w1[0].roll(32, 0)) and torch.equal(args.w1_scale[1], args.w1_scale[0].roll(32))
    assert torch.equal(args.w2[3], args.w2[0].roll(96, 0)) and torch.equal(args.w2_scale[3], args.w2_scale[0].roll(96))


# The check.


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_check_passes_what_is_right(name, tokens):
    args = call(name, tokens)
    result = own_call(args, "auto")()
    check = prepare_check(args, result)
    assert len(check.sample.tokens) == min(tokens, 4) and check.sample.tokens[-1] == tokens - 1
    assert check.difference(result) == 0 and 0.5 < check.oracle(result) < 1.25
    assert check.difference(emulate(args)) < check.sample.emulated * 2 and check.oracle(emulate(args)) == 1
    # Rows that are not rounded, as a path without a sort leaves them.
    unrounded = own_call(args, "reference")()
    assert check.difference(unrounded) > 0 and check.oracle(unrounded) < 1


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_check_finds_what_is_wrong(name):
    args = call(name, 40)
    check = prepare_check(args, own_call(args, "auto")())
    scale = args.w2_scale.clone()
    scale[1:] = scale[1:] + 1 if name == "mxfp4" else scale[1:] * 1.5
    wrong = own_call(replace(args, w2_scale=scale), "auto")()
    with pytest.raises(ValueError, match="wrong result: it differs from ours"):
        check.difference(wrong)
    with pytest.raises(ValueError, match="wrong result: its error is"):
        check.oracle(wrong)


@torch.no_grad()
def test_check_of_an_unquantised_call_has_no_oracle():
    _, args = next(make_calls((4, 2, 32, 16), (9,), ("uniform",), torch.float16, "cpu"))
    result = own_call(args, "auto")()
    check = prepare_check(args, result)
    assert check.sample is None and check.oracle(result) is None and check.difference(result) == 0


# Limits.


@pytest.mark.parametrize(
    ("name", "weight", "scales", "rows"),
    [
        ("fp8_tensor", 1, (1, 1), (320 + 4, 192 + 4)),
        ("fp8_tensor_static", 1, (1, 1), (320, 192)),
        ("fp8_channel", 1, (384, 320), (320 + 4, 192 + 4)),
        ("fp8_block", 1, (3 * 3, 3 * 2), (320 + 4 * 3, 192 + 4 * 2)),
        ("int8_block", 1, (3 * 3, 3 * 2), (320 + 4 * 3, 192 + 4 * 2)),
        ("int8_weights", 1, (384, 320), (0, 0)),
        ("int4", 0.5, (384 * 3, 320 * 2), (0, 0)),
        ("int4_g32", 0.5, (384 * 10, 320 * 6), (0, 0)),
        ("mxfp4", 0.5, (384 * 10 / 4, 320 * 6 / 4), (0, 0)),
    ],
)
def test_work_in_a_format(name, weight, scales, rows):
    args = call(name)
    args.topk_ids = torch.tensor([[0, 1]] * 8 + [[0, 3]], dtype=torch.int32)
    work = work_of(args)
    assert work.counts == (9, 8, 1) and (work.up_flops, work.down_flops) == (2 * 384 * 320, 2 * 320 * 192)
    assert work.up_weight_bytes == 3 * (384 * 320 * weight + 4 * scales[0])
    assert work.down_weight_bytes == 3 * (320 * 192 * weight + 4 * scales[1])
    assert (work.token_bytes, work.act_bytes, work.rows_bytes) == (9 * 320 * 2, 18 * 192 * 2, 18 * 320 * 2)
    assert (work.quantized_token_bytes, work.quantized_act_bytes) == (9 * rows[0], 18 * rows[1])


def test_limit_is_that_of_the_product_in_fp8():
    assert Rates(800.0, 4000.0, 1600.0).limit(800e9, 1e6) == (pytest.approx(0.5), "flops")


def test_stage_report_with_quantised_rows():
    work = Work((100, 28), 2 * 10**9, 0, 400, 200, 10, 40, 80, 6, 22)
    stages = {"quantize": 1e-4, "route": 0.01, "up": 0.4, "down": 0.2, "combine": 1e-4}
    report = stage_report(work, Rates(800.0, 4000.0, 1600.0), stages, 0.66)
    assert report["quantize"]["gbs"] == pytest.approx((10 + 6) / 1e-4 / 1e6)
    assert (report["up"]["of_cublas"], report["up"]["of_scaled_mm"]) == (pytest.approx(0.8), pytest.approx(0.4))
    assert report["up"]["of_limit"] == pytest.approx(0.4)
    assert report["down"]["of_limit"] == pytest.approx((200 + 22 + 80) / 4000e6 / 0.2)
    assert report["op_over_stages"] == pytest.approx(0.66 / (0.6 + (90 + 16) / 4000e6))
    # One token's rows stay as they are.
    report = stage_report(work, Rates(800.0, 4000.0, 1600.0), {"up": 0.4, "down": 0.2}, 0.66)
    assert report["down"]["of_limit"] == pytest.approx((200 + 40 + 10) / 4000e6 / 0.2)


def test_the_product_in_fp8():
    a, b = torch.randn(2, 32, 32).bfloat16()
    product = harness._scaled_product(a, b)()
    a, b = (matrix.to(torch.float8_e4m3fn).float() for matrix in (a, b))
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), a @ b.T, rtol=2e-2, atol=2e-2)


# Recorded peers, and the tables of the study that found them.

BLOCK = """
    mixtral-8x7b    0.124 0.379 0.387 0.438 0.926 2.785 10.03
    qwen3-30b-a3b   0.037 0.129 0.180 0.210 0.261 0.579 1.773
    deepseek-v3-tp8 0.044 0.187 0.361 0.426 0.498 1.068 3.305
    deepseek-v3-ep  0.041 0.182 0.353 0.384 0.407 0.687 1.684
"""
FP8 = """
    mixtral-8x7b    0.128 0.360 0.377 0.419 0.725 2.403 9.405
    qwen3-30b-a3b   0.037 0.132 0.184 0.200 0.258 0.492 1.443
    deepseek-v3-tp8 0.050 0.193 0.360 0.467 0.609 0.885 2.420
    deepseek-v3-ep  0.048 0.178 0.337 0.377 0.408 0.557 1.487
    gpt-oss-20b     0.057 0.211 0.233 0.251 0.349 0.852 2.992
"""


@pytest.mark.parametrize(("name", "table"), [("fp8-block", BLOCK), ("fp8", FP8)], ids=["fp8-block", "fp8"])
def test_best_recorded_in_fp8(name, table):
    peers = load_peers(RESULTS / f"2026-11-22-h200-peers-{name}.json")
    assert set(peers["formats"]) <= FORMATS.keys() and peers["dtype"] == "bfloat16"
    best = best_recorded(peers)
    lines = [line.split() for line in table.split("\n") if line.strip()]
    assert len(best) == 7 * len(lines)
    for shape, *times in lines:
        for tokens, time in zip((1, 16, 64, 256, 1024, 4096, 16384), times, strict=True):
            assert best[shape, tokens][0] == pytest.approx(float(time), abs=5e-3 if float(time) >= 10 else 6e-4)


def test_recorded_files_have_formats_of_their_own():
    formats = [
        json.loads((RESULTS / f"2026-11-22-h200-peers-{name}.json").read_text()).get("formats", ["none"])
        for name in ("bf16", "fp8", "fp8-block")
    ]
    assert len({name for names in formats for name in names}) == sum(map(len, formats))
