"""Ahead of time, without a GPU: the general kernels compile for every format and architecture, to what is meant."""

import itertools
import re

import pytest
import torch

from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.testing import override
from tests.amount import in_full, params
from tests.aot.harness import DEVICES, compile_call
from tests.quantized import quantized_case

GEMMS = {"up_kernel", "down_kernel", "gemv_up_kernel", "gemv_down_kernel"}
SIZES = {"hidden": 512, "intermediate": 256, "experts": 8, "top_k": 2}
# Of the formats that differ in nothing but where their scales come from, one.
DISTINCT = ["fp8_channel", "fp8_block", "int8_channel", "int8_weights", "int4_zero_points", "mxfp4"]
# Those whose weights become numbers of 16 bits.
WEIGHTS = ["int8_weights", "int4", "int4_zero_points", "mxfp4"]


def made_where_they_are_multiplied(name, kernel):
    """In pairs, in registers, which wgmma takes: no weight goes through shared memory again."""
    products = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", kernel.ptx)
    assert products and set(products) == {"{"}, kernel.name
    # A pair takes one fma or two, and e2m1 a second one for its scale.
    assert kernel.count("fma.rn.bf16x2") >= 2 * len(products), kernel.name
    if name != "int8_weights":  # its sums over all of K are the accumulator
        assert not kernel.serialized, kernel.name


@pytest.mark.parametrize(
    ("num_tokens", "name"),
    params(
        [*itertools.product([1, 16, 1024], DISTINCT), (16, "int4"), (1024, "int4"), (256, "int8_weights")],
        # Alone, and in a batch of few or of many.
        [*((1, name) for name in DISTINCT), (16, "fp8_block"), (16, "int4"), (16, "mxfp4"),
         *((1024, name) for name in DISTINCT if name != "mxfp4")],
    ),
)  # fmt: skip
def test_hopper(name, num_tokens):
    args = quantized_case(name, torch.bfloat16, num_tokens=num_tokens, **SIZES)
    with override(variant=None if num_tokens == 1 else "sorted"):
        kernels = compile_call(args, 90)
    for kernel in kernels.values():
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_memory <= DEVICES[90].shared_memory
    for gemm in GEMMS & kernels.keys():
        if num_tokens == 1:
            assert kernels[gemm].count("ld.global.v4") > 0, gemm
        else:
            assert kernels[gemm].count("wgmma.mma_async") > 0 == kernels[gemm].count("mma.sync"), gemm
            assert kernels[gemm].count("cp.async.bulk.tensor") > 0, gemm
            if name in WEIGHTS:
                made_where_they_are_multiplied(name, kernels[gemm])


@in_full
@pytest.mark.parametrize("num_tokens", [16, 1024])
@pytest.mark.parametrize("name", WEIGHTS)
def test_many_steps(name, num_tokens):
    args = quantized_case(
        name, torch.bfloat16, num_tokens=num_tokens, hidden=1024, intermediate=2304, experts=8, top_k=2
    )
    with override(variant="sorted"):
        kernels = compile_call(args, 90)
        # 16 tokens have the down GEMM's K in parts.
        assert (make_plan(make_problem(args), DEVICES[90]).splits > 1) == (num_tokens == 16)
    for gemm in ("up_kernel", "down_kernel"):
        assert kernels[gemm].spills == 0, gemm
        made_where_they_are_multiplied(name, kernels[gemm])


@pytest.mark.parametrize(
    ("arch", "name"),
    params(
        itertools.product([80, 89, 100, 120], DISTINCT),
        # sm_80 has no fp8, and is soon done with it.
        [*((80, name) for name in DISTINCT if not name.startswith("int8")), (89, "fp8_block"),
         (100, "fp8_block"), (100, "int8_weights"),
         (100, "int4_zero_points"), (120, "fp8_channel"), (120, "int8_channel"), (120, "mxfp4")],
    ),
)  # fmt: skip
def test_other_architectures(name, arch):
    num_tokens = 1024 if arch == 100 else 16
    args = quantized_case(name, torch.float16, num_tokens=num_tokens, **SIZES)
    if arch == 80 and name.startswith("fp8"):
        with pytest.raises(ValueError, match=r"compute capability 8\.0, and fp8 needs 8\.9"):
            compile_call(args, arch)
        return
    for kernel in compile_call(args, arch).values():
        assert kernel.shared_memory <= DEVICES[arch].shared_memory, kernel.name
