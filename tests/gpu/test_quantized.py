"""Quantised calls on the GPU: every format on every path and variant, options, hard rows."""

from dataclasses import replace

import pytest
import torch

from moe_ops.devices import describe
from moe_ops.problem import make_problem
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import assert_correct, assert_exact, errors, override, poisoned_memory
from moe_ops.testing.emulator import emulate
from moe_ops.tuning import VARIANTS, variant_obstacle
from moe_ops.tuning.variants import blockscaled_tiles, pingpong_tiles
from tests.cases import OPTIONS, run
from tests.quantized import (
    FORMATS,
    check_every_scale,
    every_scale_case,
    hard_rows,
    negative_scales_case,
    one_hot_case,
    quantized_case,
    scales_of_zero_case,
    with_options,
)

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
# (path, variant, tokens): few and many rows an expert, and one token.
RUNS = [
    ("classic", "direct", 3),
    ("classic", "sorted", 7),
    ("classic", "sorted", 400),
    ("tma", "direct", 1),
    *(("tma", variant, tokens) for variant in VARIANTS if variant != "direct" for tokens in (7, 150, 1500)),
    ("tma", "packed", 20),
]
SHAPES = {"whole": {"hidden": 512, "intermediate": 256}, "tails": {"hidden": 288, "intermediate": 160}}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def skip_unless_it_runs(args, path: str, variant: str) -> None:
    if args.quantization == "fp8_w8a8" and CAPABILITY < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    if path == "tma" and CAPABILITY < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    obstacle = variant_obstacle(variant, make_problem(args), describe(args.w1.device), path)
    if obstacle is not None:
        pytest.skip(obstacle)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("path", "variant", "num_tokens"), RUNS)
@pytest.mark.parametrize("name", FORMATS)
def test_format(name, path, variant, num_tokens, shape):
    dtype = torch.float16 if shape == "tails" else torch.bfloat16
    args = quantized_case(name, dtype, "cuda", num_tokens=num_tokens, routing="zipf", **SHAPES[shape])
    skip_unless_it_runs(args, path, variant)
    with override(path=path, variant=variant), poisoned_memory():
        out = run(args)
        again = run(args)
    assert_correct(out, args)
    assert torch.equal(out, again)


@pytest.mark.parametrize("path", ["tma", "classic"])
@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("name", ["int4", "int4_zero_points", "mxfp4", "int8_weights"])
def test_down_gemm_in_parts(name, splits, path):
    """The last part of K is short, or there is nothing left for it; the bias is added once."""
    args = quantized_case(name, torch.bfloat16, "cuda", num_tokens=5, bias=True, hidden=288, intermediate=1184)
    skip_unless_it_runs(args, path, "sorted")
    with override(path=path, variant="sorted", splits=splits), poisoned_memory():
        out = run(args)
        again = run(args)
    assert_correct(out, args)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_more_row_blocks_than_programs(name):
    """Of launches with fewer programs than tiles the first ones have two."""
    sizes = {"experts": 64, "top_k": 4, "hidden": 4096, "intermediate": 1024}
    args = quantized_case(name, torch.bfloat16, "cuda", num_tokens=24, **sizes)
    skip_unless_it_runs(args, "tma", "packed")
    with override(path="tma", variant="packed"), poisoned_memory():
        out = run(args)
        again = run(args)
    assert_correct(out, args)
    assert torch.equal(out, again)


@DTYPES
@pytest.mark.parametrize(("name", "option"), with_options())
def test_option(name, option, dtype):
    args = quantized_case(name, dtype, "cuda", **OPTIONS[option])
    skip_unless_it_runs(args, "classic", "sorted")
    with poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@pytest.mark.parametrize(
    ("name", "block_m"), [("fp8_channel", 64), ("fp8_static", 64), ("fp8_block", 64), ("fp8_block", 128)]
)
@pytest.mark.parametrize("option", [name for name in OPTIONS if "n_major" not in name and "tails" not in name])
def test_option_of_the_prefill_kernels(name, block_m, option):
    """With a row block of 128 the two consumers of the block-scaled kernel share its weights."""
    args = quantized_case(name, torch.bfloat16, "cuda", **{"num_tokens": 300, **OPTIONS[option]})
    variant = "blockscaled" if name == "fp8_block" else "pingpong"
    skip_unless_it_runs(args, "tma", variant)
    tiles = (blockscaled_tiles if name == "fp8_block" else pingpong_tiles)(make_problem(args))
    config = tuple(replace(tile, block_m=block_m) for tile in tiles)
    with override(path="tma", variant=variant, config=config), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@pytest.mark.parametrize(
    ("path", "variant"),
    [("classic", "sorted"), ("tma", "sorted"), ("classic", "direct"), ("tma", "packed"), ("tma", "mixed")],
)
@pytest.mark.parametrize("quantization", ["int4_w4a16", "mxfp4_w4a16"])
@DTYPES
def test_every_code_in_every_place(quantization, path, variant, dtype):
    args = one_hot_case(quantization, dtype, "cuda")
    skip_unless_it_runs(args, path, variant)
    with override(path=path, variant=variant), poisoned_memory():
        assert_exact(run(args), args)


@pytest.mark.parametrize("num_tokens", [8, 16, 64])
@pytest.mark.parametrize("variant", ["sorted", "packed", "mixed"])
def test_every_scale_of_mxfp4(variant, num_tokens):
    args, expected = every_scale_case("cuda", num_tokens)
    skip_unless_it_runs(args, "tma", variant)
    check_every_scale(args, expected, variant)


@pytest.mark.parametrize("variant", ["sorted", "pingpong"])
def test_given_scales_of_zero(variant):
    args = scales_of_zero_case("cuda")
    with override(path="tma", variant=variant), poisoned_memory():
        assert (run(args) == 0).all()


@pytest.mark.parametrize("variant", ["sorted", "pingpong"])
def test_given_scales_below_zero(variant):
    args = negative_scales_case("cuda")
    with override(path="tma", variant=variant), poisoned_memory():
        assert_correct(run(args), args)


@pytest.mark.parametrize("variant", ["sorted", "pingpong", "blockscaled"])
@pytest.mark.parametrize("name", ["fp8_channel", "fp8_block", "int8_channel", "int8_block", "fp8_static"])
def test_rows_that_are_hard_to_scale(name, variant):
    """Zeros give zeros, a NaN stays where it is, and no row changes another."""
    args = quantized_case(name, torch.bfloat16, "cuda", num_tokens=8, routing="uniform")
    skip_unless_it_runs(args, "tma", variant)
    args.hidden_states = hard_rows(torch.bfloat16, args.hidden_states.shape[1], "cuda")
    with override(path="tma", variant=variant), poisoned_memory():
        out = run(args)
        args.hidden_states = args.hidden_states.nan_to_num(0.0, 1.0, 1.0)
        tame = run(args)
    assert (out[0] == 0).all()
    assert out[3].isnan().all()
    assert out[[0, 1, 6, 7]].isfinite().all()
    assert torch.equal(out[7], tame[7])


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block", "int8_channel", "mxfp4"])
@pytest.mark.parametrize("num_tokens", [16, 700])
def test_repeats(name, num_tokens):
    """The kernels of a call overlap: the same bits 500 times, beside another stream that takes what is free."""
    args = quantized_case(name, torch.bfloat16, "cuda", num_tokens=num_tokens)
    skip_unless_it_runs(args, "classic", "sorted")
    expected, wrong = run(args), torch.zeros((), dtype=torch.int64, device="cuda")
    noise, other = torch.randn(2**22, device="cuda"), torch.cuda.Stream()
    for _ in range(500):
        with torch.cuda.stream(other):
            noise.mul_(1.0)
        wrong += (run(args) != expected).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("variant", ["sorted", "pingpong"])
@pytest.mark.parametrize("num_tokens", [16, 256])
def test_error_of_accumulation(num_tokens, variant):
    """Tensor cores add fp8 products with fewer bits than fp32 has; over a long K too the rule holds."""
    args = quantized_case(
        "fp8_channel", torch.bfloat16, "cuda", num_tokens=num_tokens, hidden=4096, intermediate=14336, experts=2,
        top_k=1,
    )  # fmt: skip
    skip_unless_it_runs(args, "tma", variant)
    with override(path="tma", variant=variant):
        error = assert_correct(run(args), args)
    print(variant, num_tokens, error, errors(emulate(args), fused_moe_reference(args)))
