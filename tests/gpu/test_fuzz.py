"""Drawn calls against the real kernels: results by the rule, the same bits twice, nothing read that nobody wrote.

A failure prints a `Call(...)`; `moe_ops.testing.strategies.build(call, "cuda")` makes its arguments again.
MOE_OPS_FUZZ_EXAMPLES is the number of calls of a run.
"""

import os

import pytest
import torch
from hypothesis import assume, given

from moe_ops.devices import describe
from moe_ops.problem import make_problem
from moe_ops.testing import override, poisoned_memory
from moe_ops.testing.strategies import assert_result, build, calls, formats
from moe_ops.tuning import variant_obstacle
from tests.cases import run
from tests.fuzz import drawing

EXAMPLES = int(os.environ.get("MOE_OPS_FUZZ_EXAMPLES", "500"))
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
HALF = (torch.bfloat16, torch.float16)
LARGE = {"max_tokens": 4096, "max_size": 1024, "max_experts": 64}
# Without a sort only few tokens make sense, and the others' time is better spent elsewhere.
FEW = {"max_tokens": 16, "max_size": 1024}
ROWS = formats(("fp8_w8a8",), blocks=False)
BLOCKS = formats(("fp8_w8a8",), blocks=True)
PACKED = formats(("int4_w4a16", "mxfp4_w4a16"))
WEIGHTS = formats(("int8_w8a16", "int4_w4a16", "mxfp4_w4a16"))
GLUON = ("pingpong", "blockscaled", "packed", "mixed")
CASES = {
    "classic": ("sorted", calls(tma=False, dtypes=(*HALF, torch.float32), **LARGE)),
    "classic_direct": ("direct", calls(tma=False, dtypes=(*HALF, torch.float32), **FEW)),
    "tma": ("sorted", calls(dtypes=HALF, **LARGE)),
    "tma_direct": ("direct", calls(dtypes=HALF, **FEW)),
    "tma_pingpong": ("pingpong", calls(dtypes=HALF, **LARGE)),
    "quantized_classic": ("sorted", calls(tma=False, dtypes=(*HALF, torch.float32), quantized=formats(), **LARGE)),
    "quantized_direct": ("direct", calls(tma=False, dtypes=(*HALF, torch.float32), quantized=formats(), **FEW)),
    "quantized_tma": ("sorted", calls(dtypes=HALF, quantized=formats(), **LARGE)),
    "quantized_pingpong": ("pingpong", calls(dtypes=HALF, quantized=ROWS, **LARGE)),
    "quantized_blockscaled": ("blockscaled", calls(dtypes=HALF, quantized=BLOCKS, **LARGE)),
    "quantized_packed": ("packed", calls(dtypes=HALF, quantized=PACKED, **LARGE)),
    "quantized_mixed": ("mixed", calls(dtypes=HALF, quantized=WEIGHTS, **LARGE)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(3600)  # most calls are compiled for
def test_drawn_calls(name):
    variant, drawn = CASES[name]
    path = "tma" if "tma" in name or variant in GLUON else "classic"
    if "quantized" in name and CAPABILITY < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    if path == "tma" and CAPABILITY < (9, 0):
        pytest.skip("needs compute capability 9.0")
    if variant in GLUON and CAPABILITY[0] != 9:
        pytest.skip("wgmma is Hopper's")

    @drawing(EXAMPLES, len(CASES), same_up_to=500)
    @given(drawn)
    def holds(call):
        args = build(call, "cuda")
        assume(variant_obstacle(variant, make_problem(args), describe(args.w1.device), path) is None)
        with override(path=path, variant=variant), poisoned_memory():
            out = run(args)
            again = run(args)
        assert_result(out, args)
        assert torch.equal(out.nan_to_num(7), again.nan_to_num(7))
        torch.cuda.synchronize()

    holds()
