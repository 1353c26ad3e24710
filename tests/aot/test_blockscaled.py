"""Ahead of time, without a GPU: the block-scaled kernel compiles for Hopper to what is meant, for every option."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.backends import blockscaled, pingpong
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import make_plan, row_stride
from moe_ops.problem import make_problem
from moe_ops.routing import empty_routing
from moe_ops.tuning.variants import blockscaled_obstacle, blockscaled_tiles, tiles_obstacle
from tests.amount import in_full, params
from tests.aot.harness import DEVICES, KIB, compiling, make_call, report

# 12 warps share 64 Ki registers, in units of 8 a thread.
REGISTERS_AT_ENTRY = 168
FP8 = torch.float8_e4m3fn
QWEN3 = {"hidden": 2048, "intermediate": 768}
TAILS = {"hidden": 1008, "intermediate": 368, "bias": True}
GPT_OSS = {"hidden": 2880, "activation": "swigluoai", "gate_up_layout": "interleaved", "bias": True}

# Options of the up GEMM alone have the sizes of others: the down GEMM is then compiled once.
VARIANTS = {
    "plain": QWEN3,
    "plain_float16": {**QWEN3, "dtype": torch.float16},
    "one_k_step": {"hidden": 64, "intermediate": 48},
    "straddling_blocks": TAILS,
    "e5m2": {"weight_dtype": torch.float8_e5m2},
    "interleaved": {**GPT_OSS, "intermediate": 2880},
    "router_weight_on_input": {**TAILS, "apply_router_weight_on_input": True},
    "gelu": {**TAILS, "activation": "gelu"},
    "gelu_tanh": {**QWEN3, "activation": "gelu_tanh", "apply_router_weight_on_input": True},
    "gelu_no_gate": {**TAILS, "activation": "gelu_no_gate", "apply_router_weight_on_input": True},
    "relu2_no_gate": {**QWEN3, "activation": "relu2_no_gate"},
}


def compile_pair(block_m, **options):
    """The up and the down GEMM of a call, compiled."""
    args = make_call(fp8="block", **options)
    problem = make_problem(args)
    assert blockscaled_obstacle(problem, DEVICES[90]) is None
    up, down = (replace(tile, block_m=block_m) for tile in blockscaled_tiles(problem))
    plan = replace(make_plan(problem, DEVICES[90]), variant="blockscaled", up=up, down=down)
    routing = empty_routing(args.topk_ids, problem.num_experts, block_m)
    progress = torch.zeros(1, dtype=torch.int32)
    x = quantized(problem.num_tokens, problem.hidden_size)
    act = quantized(routing.sorted_routes.numel(), problem.intermediate_size)
    rows = torch.zeros(len(act.values), row_stride(problem.hidden_size), dtype=problem.dtype)[:, : problem.hidden_size]
    with compiling(90) as launches:
        blockscaled.up(args, problem, plan, routing, progress, args.topk_weights, x, act)
        blockscaled.down(args, problem, plan, routing, progress, act, rows)
    return [report(name, kernel) for name, (_, kernel) in zip(("up", "down"), launches, strict=True)]


def quantized(num_rows, columns):
    values = torch.zeros(num_rows, row_stride(columns)).to(FP8)[:, :columns]
    return ScaledRows(values, torch.zeros(-(-columns // 128), num_rows), 1, num_rows)


# Bytes that the up GEMM may spill, and in Triton 3.9 does: what an epilogue of two groups of columns keeps of the
# launch and the tile, stored once and loaded a few times a tile, outside the turns.
SPILLS = {("gelu_no_gate", 64): 220, ("relu2_no_gate", 64): 136}
# One row block for both consumers changes nothing in the epilogue: a few variants show the rest.
CASES = [*((name, 64) for name in VARIANTS), *((name, 128) for name in ("plain", "straddling_blocks", "interleaved"))]
# What they compute is tested where the kernel is emulated.
USUAL = [("plain_float16", 64), ("straddling_blocks", 64), ("interleaved", 128)]


@pytest.mark.parametrize(("name", "block_m"), params(CASES, USUAL))
def test_variants(name, block_m):
    up, down = compile_pair(block_m, **VARIANTS[name])
    weights = "e5m2" if VARIANTS[name].get("weight_dtype") == torch.float8_e5m2 else "e4m3"
    assert up.spills <= SPILLS.get((name, block_m), 0)
    assert down.spills == 0
    for kernel in (up, down):
        assert not kernel.serialized
        assert kernel.registers == REGISTERS_AT_ENTRY
        assert kernel.shared_memory <= 227 * KIB
        # Two consumers with one loop each, of a turn for either half of it: four instructions.
        assert kernel.count(f"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.{weights}") == 16
        assert kernel.count("wgmma.mma_async") == 16
        assert kernel.count("cp.async.bulk.tensor.3d.shared") > 0 < kernel.count("cp.async.bulk.tensor.3d.global")
        # Consumers that share their ring take turns.
        assert (kernel.count("bar.arrive") > 0) == (block_m == 128)
    # The up GEMM gathers by 16 bytes and quantises, the down GEMM takes its rows by TMA.
    assert up.count("cp.async.cg.shared.global") > 0 < up.count("cp.async.wait_group")
    assert up.count("cp.async.bulk.tensor.2d.shared") == 0 == down.count("cp.async.cg")
    assert down.count("cp.async.bulk.tensor.2d.shared") > 0
    # Only scales of rows are copied by 4 bytes, two a thread.
    assert up.count("cp.async.ca") % 2 == 0 == down.count("cp.async.ca") % 2
    assert up.count("cp.async.ca.shared.global [") >= 4 <= down.count("cp.async.ca.shared.global [")
    assert up.count("cvt.rn.satfinite.e4m3x2.f32") > 0 == down.count("cvt.rn.satfinite.e4m3x2.f32")


@in_full
def test_proxy_fence(monkeypatch):
    """Each warp that gathers rows has one between two stages and one after the last; rows that TMA wrote need none.

    The compiler may peel the loop over the stages, and so have more.
    """
    fenced = [kernel.count("fence.proxy.async") for kernel in compile_pair(64)]
    monkeypatch.setattr(pingpong, "PROXY_FENCE", False)
    unfenced = [kernel.count("fence.proxy.async") for kernel in compile_pair(64)]
    assert fenced[0] >= unfenced[0] + 4
    assert fenced[1] == unfenced[1]


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({"fp8": "block"}, DEVICES[90], None),
        ({"fp8": "block"}, DEVICES[100], "10.0"),
        ({"fp8": "tensor"}, DEVICES[90], "block of [128, 128]"),
        ({}, DEVICES[90], "block of [128, 128]"),
        ({"fp8": "block", "hidden": 1000}, DEVICES[90], "H is 1000"),
        ({"fp8": "block", "intermediate": 360}, DEVICES[90], "I is 360"),
        ({"fp8": "block", "n_major": True}, DEVICES[90], "w1 is N-major"),
        ({"fp8": "block", "dtype": torch.float32}, DEVICES[90], "float32"),
    ],
)
def test_obstacles(options, device, reason):
    obstacle = blockscaled_obstacle(make_problem(make_call(**options)), device)
    assert obstacle is None if reason is None else reason in obstacle


@pytest.mark.parametrize(("num_tokens", "block_m"), [(512, 64), (1024, 128)])
def test_tiles(num_tokens, block_m):
    problem = make_problem(make_call(num_tokens, 128, 128, fp8="block"))
    tiles = blockscaled_tiles(problem)
    assert [tile.block_m for tile in tiles] == [block_m] * 2
    for rows in (64, 128):
        forced = [replace(tile, block_m=rows, group_m=4, num_stages=4) for tile in tiles]
        assert tiles_obstacle("blockscaled", problem, *forced) is None
    assert "only group_m and num_stages" in tiles_obstacle(
        "blockscaled", problem, *(replace(t, block_k=64) for t in tiles)
    )
