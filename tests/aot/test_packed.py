"""Ahead of time, without a GPU: the kernels for packed weights compile for Hopper to what is meant."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.problem import make_problem
from moe_ops.testing import override
from moe_ops.tuning.variants import packed_obstacle, packed_tiles, tiles_obstacle
from tests.amount import params
from tests.aot.harness import DEVICES, compile_call
from tests.quantized import quantized_case

SIZES = {"num_tokens": 5, "hidden": 1024, "intermediate": 1280, "experts": 4, "top_k": 2}
# The last step has half a block more, and planes end with zeros.
TAILS = {"hidden": 288, "intermediate": 1184, "bias": True}
BF16, FP16 = torch.bfloat16, torch.float16

VARIANTS = {
    "int4": ("int4", BF16, SIZES),
    "int4 float16": ("int4", FP16, SIZES),
    "int4 tails": ("int4", BF16, SIZES | TAILS),
    "int4 tails float16": ("int4", FP16, SIZES | TAILS),
    "int4 zero points": ("int4_zero_points", BF16, SIZES),
    "int4 zero points tails": ("int4_zero_points", FP16, SIZES | TAILS),
    "mxfp4": ("mxfp4", BF16, SIZES),
    "mxfp4 float16": ("mxfp4", FP16, SIZES),
    "mxfp4 tails": ("mxfp4", BF16, SIZES | TAILS),
    "gpt-oss": ("mxfp4", BF16, SIZES | TAILS | {"gate_up_layout": "interleaved", "activation": "swigluoai"}),
    "no gate": ("int4", BF16, SIZES | TAILS | {"activation": "relu2_no_gate"}),
    "gelu": ("mxfp4", BF16, SIZES | {"activation": "gelu", "apply_router_weight_on_input": True}),
    "parts": ("int4", BF16, SIZES | {"num_tokens": 1, "intermediate": 8192}),
    "16 rows": ("int4", BF16, SIZES | {"num_tokens": 12}),
    "16 rows of mxfp4": ("mxfp4", BF16, SIZES | {"num_tokens": 12} | TAILS),
    "16 rows with zero points": ("int4_zero_points", BF16, SIZES | {"num_tokens": 12} | TAILS),
    "16 rows of many columns": ("int4", BF16, SIZES | {"num_tokens": 12, "hidden": 2880, "intermediate": 320}),
    "32 rows of many columns": ("mxfp4", BF16, SIZES | {"num_tokens": 30, "hidden": 288, "intermediate": 2880}),
    "32 rows": ("int4", BF16, SIZES | {"num_tokens": 30}),
    "32 rows of mxfp4": ("mxfp4", BF16, SIZES | {"num_tokens": 30} | TAILS),
}
USUAL = ["int4 zero points tails", "gpt-oss", "32 rows"]


@pytest.mark.parametrize("name", params(list(VARIANTS), USUAL))
def test_variants(name):
    form, dtype, options = VARIANTS[name]
    args = quantized_case(form, dtype, **options)
    with override(variant="packed"):
        kernels = compile_call(args, 90)
    for gemm in (kernels["packed_up_kernel"], kernels["packed_down_kernel"]):
        assert gemm.spills == 0 and not gemm.serialized, gemm.name
        # Weights go from shared memory into registers by 16 bytes, and never back.
        first, last = gemm.ptx.index("wgmma.mma_async"), gemm.ptx.rindex("wgmma.mma_async")
        assert "st.shared" not in gemm.ptx[gemm.ptx.rindex("ld.shared.v4", 0, first) : last]
        products = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", gemm.ptx)
        assert products and set(products) == {"{"}


@pytest.mark.parametrize(
    ("form", "options", "arch", "reason"),
    [
        ("int4", {}, 90, None),
        ("mxfp4", {"hidden": 36, "intermediate": 40}, 90, None),
        ("int4", {}, 100, "10.0"),
        ("fp8_channel", {}, 90, "not packed"),
        ("int8_weights", {}, 90, "not packed"),
        ("int4", {"hidden": 34}, 90, "H is 34"),
        ("int4", {"intermediate": 36}, 90, "I is 36"),
        ("int4", {"dtype": torch.float32}, 90, "float32"),
    ],
)
def test_obstacles(form, options, arch, reason):
    obstacle = packed_obstacle(make_problem(quantized_case(form, **{"dtype": BF16} | options)), DEVICES[arch])
    assert obstacle is None if reason is None else reason in obstacle


@pytest.mark.parametrize(("num_tokens", "block_m", "stages"), [(5, 8, 3), (12, 16, 4), (60, 32, 4)])
def test_tiles(num_tokens, block_m, stages):
    problem = make_problem(quantized_case("int4", BF16, **SIZES | {"num_tokens": num_tokens}))
    tiles = packed_tiles(problem, DEVICES[90])
    # Few tiles: of 16 rows and more all run at once with one program less on a multiprocessor, and a stage more each.
    assert [(tile.block_m, tile.num_stages) for tile in tiles] == [(block_m, stages)] * 2
    # Of an expert's only block all columns lie together.
    assert [tile.group_m for tile in tiles] == [1 if block_m == 8 else 8] * 2
    assert tiles_obstacle("packed", problem, *(replace(t, group_m=4, num_stages=3) for t in tiles)) is None
    for changed in ({"block_k": 128}, {"block_m": 64}, {"num_stages": 1}, {"swap_ab": False}):
        assert "block_m 8, 16 or 32" in tiles_obstacle("packed", problem, *(replace(t, **changed) for t in tiles))
