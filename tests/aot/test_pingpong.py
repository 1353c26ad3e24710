"""Ahead of time, without a GPU: the ping-pong kernel compiles for Hopper to what is meant, for every option."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.backends import pingpong
from moe_ops.dispatch import make_plan, row_stride
from moe_ops.problem import make_problem
from moe_ops.routing import empty_routing
from moe_ops.testing import override
from moe_ops.tuning.variants import pingpong_obstacle
from tests.aot.harness import DEVICES, KIB, compiling, make_call, report

# 12 warps share 64 Ki registers, in units of 8 a thread.
REGISTERS_AT_ENTRY = 168
FP16 = {"dtype": torch.float16}
GPT_OSS = {"hidden": 2880, "activation": "swigluoai", "gate_up_layout": "interleaved", "bias": True}

VARIANTS = {
    "plain": {"hidden": 2048, "intermediate": 768},
    "plain_float16": {"hidden": 2048, "intermediate": 768, **FP16},
    "four_k_steps": {"hidden": 256, "intermediate": 256},
    "one_k_step": {"hidden": 64, "intermediate": 40},
    "tails": {"hidden": 1000, "intermediate": 360, "bias": True},
    "gpt_oss": {**GPT_OSS, "intermediate": 2880},
    "interleaved": {"gate_up_layout": "interleaved"},
    "n_major": {"n_major": True, "hidden": 1000, "intermediate": 360},
    "n_major_interleaved": {**GPT_OSS, "n_major": True, **FP16},
    "router_weight_on_input": {"apply_router_weight_on_input": True, "bias": True},
    "silu_clamped": {"activation_limit": 7.0},
    "gelu": {"activation": "gelu", "bias": True, **FP16},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu_no_gate": {"activation": "silu_no_gate"},
    "gelu_no_gate": {"activation": "gelu_no_gate", "bias": True, "apply_router_weight_on_input": True},
    "relu2_no_gate": {"activation": "relu2_no_gate", "n_major": True},
}


def compile_pair(**options):
    """The up and the down GEMM of a call, compiled."""
    args = make_call(**options)
    problem = make_problem(args)
    with override(variant="pingpong"):
        plan = make_plan(problem, DEVICES[90])
    assert plan.variant == "pingpong"
    routing = empty_routing(args.topk_ids, problem.num_experts, plan.block_m)
    act, rows = (
        args.hidden_states.new_zeros(routing.sorted_routes.numel(), row_stride(columns))[:, :columns]
        for columns in (problem.intermediate_size, problem.hidden_size)
    )
    with compiling(90) as launches:
        pingpong.up(args, problem, plan, routing, args.topk_weights, act)
        pingpong.down(args, problem, plan, routing, act, rows)
    return [report(name, kernel) for name, (_, kernel) in zip(("up", "down"), launches, strict=True)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    up, down = compile_pair(**VARIANTS[name])
    dtype = "f16" if VARIANTS[name].get("dtype") == torch.float16 else "bf16"
    for kernel in (up, down):
        assert kernel.spills == 0
        assert not kernel.serialized
        assert kernel.registers == REGISTERS_AT_ENTRY
        assert kernel.shared_memory <= 227 * KIB
        assert kernel.count("setmaxnreg.dec") > 0 < kernel.count("setmaxnreg.inc")
        # Two consumers with one loop each of four instructions: no copy of the loop for the first or the last step.
        assert kernel.count(f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{dtype}.{dtype}") == 8
        assert kernel.count("wgmma.mma_async") == 8
        # Weights by box [1, rows, columns], results by box [rows, columns].
        assert kernel.count("cp.async.bulk.tensor.3d.shared") > 0 < kernel.count("cp.async.bulk.tensor.2d.global")
    # The up GEMM gathers by 16 bytes, the down GEMM takes its rows by TMA.
    assert up.count("cp.async.cg.shared.global") > 0 < up.count("cp.async.mbarrier.arrive.noinc")
    assert up.count("cp.async.ca") == up.count("cp.async.bulk.tensor.2d.shared") == 0
    assert down.count("cp.async.cg") == 0 < down.count("cp.async.bulk.tensor.2d.shared")


def test_proxy_fence(monkeypatch):
    """One in each consumer's loop of the up GEMM, beside those before the TMA stores; none for rows that TMA wrote."""
    fenced = [kernel.count("fence.proxy.async") for kernel in compile_pair()]
    monkeypatch.setattr(pingpong, "PROXY_FENCE", False)
    assert [kernel.count("fence.proxy.async") for kernel in compile_pair()] == [fenced[0] - 2, fenced[1]]


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(6, 64)[::2], False),
        (torch.zeros(4, 72)[:, :64], False),
        (torch.zeros(4, 65)[:, :64], True),
        (torch.zeros(4, 65)[:, 1:], True),
        (torch.zeros(64, 4).T, True),
        (torch.zeros(4 * 64 + 1)[1:].view(4, 64), True),
    ],
)
def test_rows_that_cannot_be_copied_by_16_bytes_are_moved(x, copied):
    moved = pingpong._copyable(x)
    assert (moved is not x) == copied
    assert moved.shape == x.shape and moved.stride(1) == 1 and moved.stride(0) % 8 == 0 and moved.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({}, DEVICES[90], None),
        ({"n_major": True, "hidden": 1000, "intermediate": 363}, DEVICES[90], None),
        ({}, DEVICES[80], "8.0"),
        ({}, DEVICES[100], "10.0"),
        ({}, DEVICES[120], "12.0"),
        ({}, replace(DEVICES[90], interpreted=True), "interpreter"),
        ({}, replace(DEVICES[90], kind="cpu", capability=None), "NVIDIA"),
        ({}, replace(DEVICES[90], triton=None), "3.6"),
        ({}, replace(DEVICES[90], triton="3.5.1"), "3.6"),
        ({}, replace(DEVICES[90], triton="3.10.0+git1234"), None),
        ({"dtype": torch.float32}, DEVICES[90], "float32"),
        ({"hidden": 1001}, DEVICES[90], "1001"),
    ],
)
def test_obstacles(options, device, reason):
    obstacle = pingpong_obstacle(make_problem(make_call(**options)), device)
    assert obstacle is None if reason is None else reason in obstacle
