"""Ahead of time, without a GPU: the ping-pong kernel compiles for Hopper to what is meant, for every option."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.backends import pingpong
from moe_ops.dispatch import make_plan, row_stride
from moe_ops.kernels.pingpong import narrow_columns
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
    "narrow": {"hidden": 2880, "intermediate": 2880, "activation_limit": 7.0},
    "narrow_float16": {**GPT_OSS, "intermediate": 2880, "gate_up_layout": "concatenated", **FP16},
    "narrow_n_major": {"hidden": 2880, "intermediate": 2880, "n_major": True, "bias": True},
    "narrow_n_major_interleaved": {**GPT_OSS, "intermediate": 2880, "n_major": True},
    "narrow_no_gate": {"hidden": 2880, "intermediate": 2880, "activation": "silu_no_gate", "bias": True, **FP16},
    "narrow_half": {"hidden": 384, "intermediate": 384, "activation": "relu2_no_gate", "n_major": True},
    "narrow_half_down": {"hidden": 1400, "intermediate": 168, "apply_router_weight_on_input": True},
    "narrow_gelu": {"intermediate": 1440, "activation": "gelu", "bias": True, "apply_router_weight_on_input": True},
    "narrow_gelu_tanh": {"intermediate": 320, "activation": "gelu_tanh", "bias": True},
    "narrow_gelu_no_gate": {"intermediate": 320, "activation": "gelu_no_gate", "bias": True, **FP16},
}

# Columns of the last tile's wgmma in the up and the down GEMM, where it is narrow.
NARROW = {
    "one_k_step": (128, 64),
    "gpt_oss": (128, 64),
    "n_major_interleaved": (None, 64),
    "narrow": (128, 64),
    "narrow_float16": (128, 64),
    "narrow_n_major": (128, 64),
    "narrow_n_major_interleaved": (128, 64),
    "narrow_no_gate": (64, 64),
    "narrow_half": (128, 128),
    "narrow_half_down": (128, 128),
    "narrow_gelu": (128, None),
    "narrow_gelu_tanh": (128, None),
    "narrow_gelu_no_gate": (64, None),
}


def compile_pair(dependent_launch=True, **options):
    """The up and the down GEMM of a call, compiled."""
    args = make_call(**options)
    problem = make_problem(args)
    with override(variant="pingpong"):
        plan = make_plan(problem, DEVICES[90])
    assert plan.variant == "pingpong" and plan.dependent_launch
    plan = replace(plan, dependent_launch=dependent_launch)
    routing = empty_routing(args.topk_ids, problem.num_experts, plan.block_m)
    act, rows = (
        args.hidden_states.new_zeros(routing.sorted_routes.numel(), row_stride(columns))[:, :columns]
        for columns in (problem.intermediate_size, problem.hidden_size)
    )
    with compiling(90) as launches:
        pingpong.up(args, problem, plan, routing, args.topk_weights, act)
        pingpong.down(args, problem, plan, routing, act, rows)
    assert [kernel.metadata.launch_pdl for _, kernel in launches] == [dependent_launch] * 2
    return [report(name, kernel) for name, (_, kernel) in zip(("up", "down"), launches, strict=True)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    up, down = compile_pair(**VARIANTS[name])
    dtype = "f16" if VARIANTS[name].get("dtype") == torch.float16 else "bf16"
    for kernel, narrow in zip((up, down), NARROW.get(name, (None, None)), strict=True):
        assert kernel.spills == 0
        assert not kernel.serialized
        assert kernel.registers == REGISTERS_AT_ENTRY
        assert kernel.shared_memory <= 227 * KIB
        assert kernel.count("setmaxnreg.dec") > 0 < kernel.count("setmaxnreg.inc")
        # Two consumers with one loop each of four instructions: no copy of the loop for the first or the last step.
        # Another such loop each for the narrow tile, if there is one.
        wgmma = "wgmma.mma_async.sync.aligned.m64n{}k16.f32." + f"{dtype}.{dtype}"
        assert kernel.count(wgmma.format(256)) == 8
        assert kernel.count("wgmma.mma_async") == (8 if narrow is None else 16)
        assert narrow is None or kernel.count(wgmma.format(narrow)) == 8
        # Weights by box [1, rows, columns], results by box [rows, columns].
        assert kernel.count("cp.async.bulk.tensor.3d.shared") > 0 < kernel.count("cp.async.bulk.tensor.2d.global")
    # The up GEMM gathers by 16 bytes, the down GEMM takes its rows by TMA.
    assert up.count("cp.async.cg.shared.global") > 0 < up.count("cp.async.mbarrier.arrive.noinc")
    assert up.count("cp.async.ca") == up.count("cp.async.bulk.tensor.2d.shared") == 0
    assert down.count("cp.async.cg") == 0 < down.count("cp.async.bulk.tensor.2d.shared")


@pytest.mark.parametrize(
    ("n", "block_n", "columns"),
    [
        (2880, 128, 64),
        (2880, 256, 64),
        (1440, 128, 64),
        (384, 256, 128),
        (385, 256, 0),
        (321, 256, 128),
        (257, 256, 64),
        (1, 128, 64),
        (360, 128, 0),
        (768, 256, 0),
    ],
)
def test_narrow_columns(n, block_n, columns):
    assert narrow_columns(n, block_n, 64) == columns


@pytest.mark.parametrize("options", [{}, {"hidden": 2880, "intermediate": 2880, "bias": True}])
def test_dependent_launch(options):
    """The successor is released first; nothing is read before the wait, nor by the warps that start after it."""
    reads = ("ld.global", "cp.async", "mbarrier.try_wait")
    for kernel in compile_pair(**options):
        assert kernel.count("griddepcontrol.launch_dependents") == kernel.count("griddepcontrol.wait") == 1
        entry, rest = kernel.ptx.split("griddepcontrol.wait")
        assert entry.index("griddepcontrol.launch_dependents") < entry.index("mbarrier.init")
        # The first warps meet the others at barrier 1, where those are from their start on, until they get their role.
        assert not any(read in entry for read in (*reads, "barrier.sync"))
        before_meeting = rest[: rest.index("barrier.sync")]
        assert not any(read in before_meeting for read in reads)
        others = re.search(r"barrier\.sync\s+1;(((?!barrier\.sync).)*)brx\.idx", rest, re.DOTALL)
        assert others is not None and not any(read in others[1] for read in reads)
    for kernel in compile_pair(dependent_launch=False, **options):
        assert kernel.count("griddepcontrol") == 0


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
