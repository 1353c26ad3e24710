"""Ahead of time, without a GPU: the kernel for 8- or 4-bit weights beside 16-bit rows compiles for Hopper as meant."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.problem import make_problem
from moe_ops.testing import override
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.variants import choose_variant, mixed_obstacle, mixed_tiles
from tests.amount import params
from tests.aot.harness import DEVICES, KIB, compiling, report
from tests.quantized import quantized_case

SIZES = {"num_tokens": 2048, "hidden": 1024, "intermediate": 1280, "experts": 4, "top_k": 2}
TAILS = {"hidden": 288, "intermediate": 1184, "bias": True}
FEW = {"num_tokens": 100}
BF16, FP16 = torch.bfloat16, torch.float16

VARIANTS = {
    "plain": ("int8_weights", BF16, {}),
    "float16": ("int8_weights", FP16, {}),
    "tails": ("int8_weights", BF16, TAILS),
    "interleaved": ("int8_weights", BF16, TAILS | {"gate_up_layout": "interleaved", "activation": "swigluoai"}),
    "no gate": ("int8_weights", BF16, TAILS | {"activation": "relu2_no_gate"}),
    "no gate float16": ("int8_weights", FP16, {"activation": "gelu_no_gate"}),
    "router weights": ("int8_weights", FP16, {"apply_router_weight_on_input": True, "activation": "gelu"}),
    "64 rows": ("int8_weights", BF16, FEW),
    "64 rows of tails": ("int8_weights", FP16, TAILS | FEW),
    "int8 groups": ("int8_weights_groups", BF16, {}),
    "int4": ("int4", BF16, {}),
    "int4 float16": ("int4", FP16, TAILS),
    "int4 zero points": ("int4_zero_points", BF16, {}),
    "int4 64 rows": ("int4", BF16, FEW),
    "mxfp4": ("mxfp4", BF16, {}),
    "mxfp4 float16": ("mxfp4", FP16, {}),
    "mxfp4 64 rows of tails": (
        "mxfp4",
        BF16,
        TAILS | FEW | {"gate_up_layout": "interleaved", "activation": "swigluoai"},
    ),
}
# Bytes, of the GEMM that has more (Triton 3.6). Zero points are as many registers more as scales; a tile's router
# weights lie beside its sums.
SPILLS = {"router weights": 300, "int4 zero points": 308}


def compiled(args):
    """The up and the down GEMM, which are one kernel."""
    from moe_ops.backends import tma
    from moe_ops.dispatch import make_plan

    problem = make_problem(args)
    with override(variant="mixed"):
        plan = make_plan(problem, DEVICES[90])
    with compiling(90) as launches:
        tma.run(args, problem, plan, args.hidden_states.new_empty(problem.out_shape))
    return [report(fn.__name__, kernel) for fn, kernel in launches if fn.__name__ == "mixed_kernel"]


@pytest.mark.parametrize("name", params(list(VARIANTS), ["mxfp4"]))
def test_variants(name):
    form, dtype, options = VARIANTS[name]
    kernels = compiled(quantized_case(form, dtype, **SIZES | options))
    assert len(kernels) == 2
    assert max(gemm.spills for gemm in kernels) <= SPILLS.get(name, 0), [gemm.spills for gemm in kernels]
    for gemm in kernels:
        assert not gemm.serialized
        assert gemm.shared_memory <= 227 * KIB
        # Weights go from shared memory into registers as wgmma has them, and wgmma takes them from there.
        assert gemm.count("ldmatrix") > 0
        products = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", gemm.ptx)
        assert products and set(products) == {"{"}


@pytest.mark.parametrize(
    ("form", "options", "arch", "reason"),
    [
        ("int8_weights", {}, 90, None),
        ("int8_weights_groups", {}, 90, None),
        ("int4_zero_points", {}, 90, None),
        ("mxfp4", {}, 90, None),
        ("int8_weights", {}, 100, "10.0"),
        ("int8_channel", {}, 90, "'int8_w8a8'"),
        ("int8_weights_zero_points", {}, 90, "zero points"),
        ("int8_weights", {"hidden": 33}, 90, "H is 33"),
        ("int8_weights", {"intermediate": 37}, 90, "I is 37"),
        ("mxfp4", {"intermediate": 38}, 90, "I is 38, not a multiple of 4"),
        ("int8_weights", {"n_major": True}, 90, "N-major"),
        ("int8_weights", {"dtype": torch.float32}, 90, "float32"),
    ],
)
def test_obstacles(form, options, arch, reason):
    obstacle = mixed_obstacle(make_problem(quantized_case(form, **{"dtype": BF16} | options)), DEVICES[arch])
    assert obstacle is None if reason is None else reason in obstacle


@pytest.mark.parametrize(("form", "stages"), [("int8_weights", 3), ("mxfp4", 4)])
def test_tiles(form, stages):
    problem = make_problem(quantized_case(form, BF16, **SIZES))
    tiles = mixed_tiles(problem)
    assert [(tile.block_m, tile.block_k, tile.num_stages) for tile in tiles] == [(128, 64, 4)] * 2
    few = mixed_tiles(make_problem(quantized_case(form, BF16, **SIZES | {"num_tokens": 80})))
    assert [(tile.block_m, tile.block_k, tile.num_stages) for tile in few] == [(64, 128, stages)] * 2
    for right in (tiles, few, [replace(tile, group_m=16, num_stages=2) for tile in tiles]):
        assert tuned_obstacle(problem, DEVICES[90], "tma", "mixed", *right) is None
    for changed in ({"block_k": 128}, {"block_m": 32}, {"num_stages": 1}, {"num_stages": 5}, {"swap_ab": False}):
        assert tuned_obstacle(problem, DEVICES[90], "tma", "mixed", *(replace(tile, **changed) for tile in tiles))


@pytest.mark.parametrize(
    ("form", "tokens", "variant"),
    [
        ("int8_weights", 32, "sorted"), ("int8_weights", 40, "mixed"), ("int4", 32, "packed"), ("int4", 40, "sorted"),
        ("int4", 48, "mixed"), ("mxfp4", 32, "packed"), ("mxfp4", 40, "mixed"), ("int8_channel", 4096, "sorted"),
    ],
)  # fmt: skip
def test_when_it_is_taken(form, tokens, variant):
    """By the rows that an expert expects, half as many here as there are tokens."""
    problem = make_problem(quantized_case(form, BF16, **SIZES | {"num_tokens": tokens}))
    assert choose_variant(problem, DEVICES[90], "tma", batch_invariant=False) == variant
