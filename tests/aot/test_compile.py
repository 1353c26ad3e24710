"""Ahead of time, without a GPU: the kernels a call launches compile for every architecture, to what is meant."""

import itertools

import pytest
import torch

from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.testing import override
from tests.amount import params
from tests.aot.harness import DEVICES, KIB, compile_call, make_call

# Tokens for 8 experts and top_k 2: 2 to 256 rows per expert, one for each tile of the heuristic.
TOKENS = [4, 16, 32, 64, 192, 1024]
GEMMS = ("up_kernel", "down_kernel")
# Rows of large tiles, by 16 bytes: a loss of alignment information makes it single elements, without any other sign.
GATHER = "cp.async.cg"

# Beside the plain call.
VARIANTS = {
    "tails": {"hidden": 1000, "intermediate": 360},
    "2880": {"hidden": 2880, "intermediate": 2880},
    "n_major": {"n_major": True},
    "n_major_interleaved": {"n_major": True, "gate_up_layout": "interleaved"},
    "gpt_oss": {"activation": "swigluoai", "gate_up_layout": "interleaved", "bias": True},
    "router_weight_on_input": {"apply_router_weight_on_input": True, "bias": True},
    "no_gate": {"activation": "relu2_no_gate"},
}


def compile_general(*args, **options):
    """The general kernels: the ping-pong kernel, which large calls take on Hopper, has tests of its own."""
    with override(variant="sorted"):
        return compile_call(make_call(*args, **options), 90)


@pytest.mark.parametrize(
    ("dtype", "num_tokens"),
    params(
        itertools.product([torch.bfloat16, torch.float16], TOKENS),
        [*((torch.bfloat16, num_tokens) for num_tokens in TOKENS), (torch.float16, 4), (torch.float16, 1024)],
    ),
    ids=str,
)
def test_hopper_tma(dtype, num_tokens):
    kernels = compile_general(num_tokens, dtype=dtype)
    assert all(kernel.spills == 0 for kernel in kernels.values())
    if num_tokens == 1024:
        assert kernels["up_kernel"].count(GATHER) > 0
    for name in GEMMS:
        kernel = kernels[name]
        assert kernel.count("cp.async.bulk.tensor") > 0
        assert 0 < kernel.shared_memory <= 227 * KIB
        # Swapped operands: even 16 rows are enough for wgmma.
        assert kernel.count("wgmma.mma_async") > 0 == kernel.count("mma.sync")
        assert kernel.count("griddepcontrol.wait") == 1 == kernel.count("griddepcontrol.launch_dependents")


# Every variant for few tokens or for many.
USUAL = [
    *((16, name) for name in ("n_major_interleaved", "gpt_oss", "no_gate")),
    *((1024, name) for name in ("tails", "2880", "n_major", "gpt_oss", "router_weight_on_input")),
]


@pytest.mark.parametrize(("num_tokens", "name"), params(itertools.product([16, 1024], VARIANTS), USUAL))
def test_hopper_tma_variants_do_not_spill(name, num_tokens):
    kernels = compile_general(num_tokens, **VARIANTS[name])
    if num_tokens == 1024:
        assert kernels["up_kernel"].count(GATHER) > 0
    for kernel in kernels.values():
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_memory <= 227 * KIB
    for name in GEMMS:
        assert kernels[name].count("cp.async.bulk.tensor") > 0


@pytest.mark.parametrize(
    ("arch", "name"),
    params(
        itertools.product([80, 90], ["plain", *VARIANTS]),
        [*((90, name) for name in ("plain", *VARIANTS)), *((80, name) for name in ("plain", "gpt_oss", "n_major"))],
    ),
)
def test_one_token(name, arch):
    """Two launches that read K-major weights 16 bytes at a time; on Hopper the second starts early and waits."""
    kernels = compile_call(make_call(1, **VARIANTS.get(name, {})), arch)
    if "n_major" in name:
        assert kernels.keys() >= set(GEMMS)
        return
    assert set(kernels) == {"gemv_up_kernel", "gemv_down_kernel"}
    for kernel in kernels.values():
        assert kernel.spills == 0, kernel.name
        assert kernel.count("ld.global.v4") > 0, kernel.name
    hopper = arch == 90
    assert kernels["gemv_up_kernel"].count("griddepcontrol.launch_dependents") == hopper
    assert kernels["gemv_down_kernel"].count("griddepcontrol.wait") == hopper


@pytest.mark.parametrize("num_tokens", [16, 1024])
@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.bfloat16), (80, torch.float32), (89, torch.bfloat16)], ids=str)
def test_ampere_and_ada_classic(arch, dtype, num_tokens):
    args = make_call(num_tokens, dtype=dtype)
    assert make_plan(make_problem(args), DEVICES[arch]).path == "classic"
    kernels = compile_call(args, arch)
    for name in GEMMS:
        kernel = kernels[name]
        assert kernel.count("cp.async.bulk.tensor") == kernel.count("wgmma.mma_async") == 0
        assert (kernel.count("mma.sync") > 0) == (dtype == torch.bfloat16)
        assert kernel.spills == 0 or dtype == torch.float32
        assert kernel.shared_memory <= DEVICES[arch].shared_memory


@pytest.mark.parametrize("num_tokens", [16, 1024])
@pytest.mark.parametrize("arch", [100, 120])
def test_blackwell_tma(arch, num_tokens):
    kernels = compile_call(make_call(num_tokens), arch)
    for name in GEMMS:
        assert kernels[name].count("cp.async.bulk.tensor") > 0
        assert kernels[name].shared_memory <= DEVICES[arch].shared_memory


@pytest.mark.parametrize("arch", DEVICES)
def test_many_routes_and_fallback(arch):
    """The three-launch sort, and weights whose rows TMA cannot step over."""
    kernels = compile_call(make_call(2048, hidden=511, intermediate=96), arch)
    assert {"count_kernel", "scan_kernel", "scatter_kernel", "combine_kernel", *GEMMS} == set(kernels)
    for name in GEMMS:
        assert kernels[name].count("cp.async.bulk.tensor") == 0
