"""Quantised calls through the Triton kernels on the CPU, on every path."""

import pytest
import torch

from moe_ops.testing import assert_correct, assert_exact, override, poisoned_memory
from moe_ops.tuning import TileConfig
from tests.amount import ALL, params
from tests.cases import OPTIONS, run
from tests.quantized import (
    FORMATS,
    hard_rows,
    negative_scales_case,
    one_hot_case,
    quantized_case,
    scales_of_zero_case,
    with_options,
)

RUNS = {"classic": ("classic", "sorted"), "tma": ("tma", "sorted"), "direct": ("classic", "direct")}
KINDS = pytest.mark.parametrize("kind", RUNS)
# Formats that always have the heuristic's tiles without a sort; see test_paths.
OWN_TILES = ("fp8_block", "int4_zero_points")
WIDE = TileConfig(1, 64, 128)


def forced(kind: str, config: TileConfig | None = None):
    path, variant = RUNS[kind]
    return override(path=path, variant=variant, config=config)


@KINDS
@pytest.mark.parametrize("name", FORMATS)
def test_format(name, kind):
    args = quantized_case(name, torch.float16, num_tokens=1 if kind == "direct" else 9)
    config = None if ALL or kind != "direct" or name in OWN_TILES else WIDE
    with forced(kind, config), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@pytest.mark.parametrize(("name", "splits"), params([("int4_zero_points", 2), ("mxfp4", 4)], [("mxfp4", 4)]))
def test_down_gemm_in_parts(name, splits):
    """The last part of K is short, or there is nothing left for it; the bias is added once."""
    args = quantized_case(name, torch.float16, num_tokens=2, bias=True, hidden=64, intermediate=288)
    tile = TileConfig(16, 64, 128, swap_ab=True)
    with override(path="tma", variant="sorted", config=tile, splits=splits), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@pytest.mark.parametrize(("name", "option"), with_options())
def test_option(name, option):
    # TMA takes K-major weights alone.
    kind = "classic" if len(option) % 2 or OPTIONS[option].get("n_major") else "tma"
    args = quantized_case(name, torch.float16, **OPTIONS[option])
    with forced(kind), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@KINDS
@pytest.mark.parametrize("quantization", ["int4_w4a16", "mxfp4_w4a16"])
def test_every_code_in_every_place(quantization, kind):
    args = one_hot_case(quantization, torch.float16, num_tokens=16 if kind == "direct" else 64)
    with forced(kind, None if ALL or kind != "direct" else WIDE), poisoned_memory():
        out = run(args)
    assert_exact(out, args)


def test_given_scales_of_zero():
    with override(path="classic", variant="sorted"), poisoned_memory():
        assert (run(scales_of_zero_case()) == 0).all()


def test_given_scales_below_zero():
    args = negative_scales_case()
    with override(path="classic", variant="sorted"), poisoned_memory():
        assert_correct(run(args), args)


@pytest.mark.parametrize("name", ["fp8_channel", "fp8_block", "int8_channel", "int8_block", "fp8_static"])
def test_rows_that_are_hard_to_scale(name):
    """Zeros give zeros, a NaN stays where it is, and no row changes another."""
    args = quantized_case(name, torch.float32, num_tokens=8, routing="uniform")
    args.hidden_states = hard_rows(torch.float32, args.hidden_states.shape[1])
    with override(path="classic", variant="sorted"), poisoned_memory():
        out = run(args)
        args.hidden_states = args.hidden_states.nan_to_num(0.0, 1.0, 1.0)
        tame = run(args)
    assert (out[0] == 0).all()
    assert out[3].isnan().all()
    assert out[[0, 1, 2, 6, 7]].isfinite().all()
    assert torch.equal(out[7], tame[7])
