"""Ahead of time, without a GPU: the ping-pong kernel compiles for Hopper to what is meant, for every option."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.backends import pingpong
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import make_plan, row_stride
from moe_ops.problem import make_problem
from moe_ops.routing import empty_routing
from moe_ops.testing import override
from moe_ops.tuning.variants import pingpong_obstacle
from tests.amount import in_full, params
from tests.aot.harness import DEVICES, KIB, compiling, make_call, report

# 12 warps share 64 Ki registers, in units of 8 a thread.
REGISTERS_AT_ENTRY = 168
FP16 = {"dtype": torch.float16}
# Options of the up GEMM alone have sizes and dtype of others: the down GEMM is then compiled once.
QWEN3 = {"hidden": 2048, "intermediate": 768}
FOUR_K_STEPS = {"hidden": 256, "intermediate": 256}
GPT_OSS = {"hidden": 2880, "activation": "swigluoai", "gate_up_layout": "interleaved", "bias": True}

VARIANTS = {
    "plain": QWEN3,
    "plain_float16": {**QWEN3, **FP16},
    "four_k_steps": FOUR_K_STEPS,
    "one_k_step": {"hidden": 64, "intermediate": 40},
    "tails": {"hidden": 1000, "intermediate": 360, "bias": True},
    "gpt_oss": {**GPT_OSS, "intermediate": 2880},
    "interleaved": {**FOUR_K_STEPS, "gate_up_layout": "interleaved"},
    "n_major": {"n_major": True, "hidden": 1000, "intermediate": 360},
    "n_major_interleaved": {**GPT_OSS, "n_major": True, **FP16},
    "router_weight_on_input": {"apply_router_weight_on_input": True, "bias": True},
    "silu_clamped": {**FOUR_K_STEPS, "activation_limit": 7.0},
    "gelu": {"activation": "gelu", "bias": True, **FP16},
    "gelu_tanh": {**FOUR_K_STEPS, "activation": "gelu_tanh"},
    "silu_no_gate": {**FOUR_K_STEPS, "activation": "silu_no_gate"},
    "gelu_no_gate": {"activation": "gelu_no_gate", "bias": True, "apply_router_weight_on_input": True},
    "relu2_no_gate": {"activation": "relu2_no_gate", "n_major": True},
}
STATIC = {"fp8": "tensor", "act_scales": 8}
FP8_VARIANTS = {
    "plain": {**QWEN3, "fp8": "tensor"},
    "per_channel": {**QWEN3, "fp8": "channel"},
    "static": {**QWEN3, **STATIC, "act_scales": 1},
    "static_per_expert": {**QWEN3, **STATIC},
    "e5m2": {**STATIC, "weight_dtype": torch.float8_e5m2, **FP16},
    "one_k_step": {"hidden": 64, "intermediate": 48, **STATIC},
    "tails": {"hidden": 1008, "intermediate": 368, "bias": True, "fp8": "channel"},
    "gpt_oss": {**GPT_OSS, "intermediate": 2880, **STATIC},
    "interleaved": {**GPT_OSS, "fp8": "channel", "act_scales": 1, "apply_router_weight_on_input": True},
    "router_weight_on_input": {"apply_router_weight_on_input": True, "bias": True, "fp8": "channel"},
    # With a bias, too, it spills some 600 bytes in Triton 3.6, in the epilogue; not in 3.9.
    "gelu": {"activation": "gelu", "fp8": "channel", "act_scales": 1},
    "gelu_bias": {"activation": "gelu", "bias": True, "fp8": "channel"},
    "gelu_tanh": {**QWEN3, "activation": "gelu_tanh", "fp8": "channel", "act_scales": 1},
    "gelu_no_gate": {"activation": "gelu_no_gate", "bias": True, "fp8": "channel", "act_scales": 1},
    "relu2_no_gate": {**QWEN3, "activation": "relu2_no_gate", **STATIC},
}
NAMES = [*VARIANTS, *(f"fp8_{name}" for name in FP8_VARIANTS)]
# The kinds of loads, scales and epilogues; what they compute is tested where the kernel is emulated.
USUAL = [
    "plain_float16", "tails", "gpt_oss", "router_weight_on_input", "fp8_plain", "fp8_static_per_expert",
    "fp8_gelu_bias",
]  # fmt: skip


def compile_pair(**options):
    """The up and the down GEMM of a call, compiled; act in fp8 by given scales, or by the up GEMM's caller."""
    args = make_call(**options)
    problem = make_problem(args)
    with override(variant="pingpong"):
        plan = make_plan(problem, DEVICES[90])
    assert plan.variant == "pingpong"
    routing = empty_routing(args.topk_ids, problem.num_experts, plan.block_m)
    progress = torch.zeros(1, dtype=torch.int32)
    up_act, rows = (
        args.hidden_states.new_zeros(routing.sorted_routes.numel(), row_stride(columns))[:, :columns]
        for columns in (problem.intermediate_size, problem.hidden_size)
    )
    x, act, quantized = ScaledRows(args.hidden_states), ScaledRows(up_act), problem.scheme.row_dtype
    if quantized is not None:
        x = ScaledRows(x.values.to(quantized), torch.zeros(problem.num_tokens), 1)
        act = ScaledRows(up_act.to(quantized), torch.zeros(len(up_act)), 1)
        if args.a2_scale is not None:
            act = ScaledRows(act.values, args.a2_scale, stride_expert=int(problem.scheme.act == "expert"))
            up_act = act.values
    with compiling(90) as launches:
        pingpong.up(args, problem, plan, routing, progress, args.topk_weights, x, up_act, args.a2_scale)
        pingpong.down(args, problem, plan, routing, progress, act, rows)
    return [report(name, kernel) for name, (_, kernel) in zip(("up", "down"), launches, strict=True)]


def multiplication(options: dict) -> str:
    """The instruction that a variant's operands need, after the sizes of its rows and columns."""
    if "fp8" in options:
        return "k32.f32.e4m3." + ("e5m2" if options.get("weight_dtype") == torch.float8_e5m2 else "e4m3")
    dtype = "f16" if options.get("dtype") == torch.float16 else "bf16"
    return f"k16.f32.{dtype}.{dtype}"


@pytest.mark.parametrize("name", params(NAMES, USUAL))
def test_variants(name):
    options = FP8_VARIANTS[name[4:]] if name.startswith("fp8_") else VARIANTS[name]
    up, down = compile_pair(**options)
    for kernel in (up, down):
        assert kernel.spills == 0
        assert not kernel.serialized
        assert kernel.registers == REGISTERS_AT_ENTRY
        assert kernel.shared_memory <= 227 * KIB
        assert kernel.count("setmaxnreg.dec") > 0 < kernel.count("setmaxnreg.inc")
        # Two consumers with one loop each of four instructions: no copy of the loop for the first or the last step.
        assert kernel.count(f"wgmma.mma_async.sync.aligned.m64n256{multiplication(options)}") == 8
        assert kernel.count("wgmma.mma_async") == 8
        # Weights and results by box [1, rows, columns].
        assert kernel.count("cp.async.bulk.tensor.3d.shared") > 0 < kernel.count("cp.async.bulk.tensor.3d.global")
    # The up GEMM gathers by 16 bytes, the down GEMM takes its rows by TMA.
    assert up.count("cp.async.cg.shared.global") > 0 < up.count("cp.async.mbarrier.arrive.noinc")
    assert up.count("cp.async.ca") == up.count("cp.async.bulk.tensor.2d.shared") == 0
    assert down.count("cp.async.cg") == 0 < down.count("cp.async.bulk.tensor.2d.shared")
    # The up GEMM rounds to fp8 where the scales of act are given.
    assert (up.count("cvt.rn.satfinite.e4m3x2.f32") > 0) == ("act_scales" in options)


@in_full
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
        (torch.zeros(4, 72).to(torch.float8_e4m3fn)[:, :64], True),
        (torch.zeros(4, 80).to(torch.float8_e4m3fn)[:, :64], False),
    ],
)
def test_rows_that_cannot_be_copied_by_16_bytes_are_moved(x, copied):
    moved = pingpong.copyable(x)
    assert (moved is not x) == copied
    assert moved.shape == x.shape and moved.stride(1) == 1
    assert moved.stride(0) * x.element_size() % 16 == moved.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({}, DEVICES[90], None),
        ({"n_major": True, "hidden": 1000, "intermediate": 363}, DEVICES[90], None),
        ({}, DEVICES[80], "8.0"),
        ({}, DEVICES[100], "10.0"),
        ({}, DEVICES[120], "12.0"),
        ({}, replace(DEVICES[90], kind="cpu", capability=None), "NVIDIA"),
        ({}, replace(DEVICES[90], triton=None), "3.6"),
        ({}, replace(DEVICES[90], triton="3.5.1"), "3.6"),
        ({}, replace(DEVICES[90], triton="3.10.0+git1234"), None),
        ({"dtype": torch.float32}, DEVICES[90], "float32"),
        ({"hidden": 1001}, DEVICES[90], "1001"),
        ({"fp8": "tensor"}, DEVICES[90], None),
        ({"fp8": "channel", "weight_dtype": torch.float8_e5m2}, DEVICES[90], None),
        ({"fp8": "block"}, DEVICES[90], "block"),
        ({"fp8": "tensor", "hidden": 1000}, DEVICES[90], "H is 1000"),
        ({"fp8": "tensor", "intermediate": 360}, DEVICES[90], "I is 360"),
        ({"fp8": "tensor", "n_major": True}, DEVICES[90], "w1 is N-major"),
        ({"fp8": "tensor", "dtype": torch.float32}, DEVICES[90], "float32"),
    ],
)
def test_obstacles(options, device, reason):
    obstacle = pingpong_obstacle(make_problem(make_call(**options)), device)
    assert obstacle is None if reason is None else reason in obstacle
