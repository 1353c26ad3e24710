"""Drawn calls through the Triton kernels in the interpreter: every access watched, every result held to the rule.

A failure prints a `Call(...)`; `moe_ops.testing.strategies.build` makes its arguments again. MOE_OPS_FUZZ_EXAMPLES is
the number of calls of a run, and of quantised ones again: the same ones every time up to 300, others every time above.
"""

import os

import pytest
from hypothesis import given

from moe_ops.testing import override
from moe_ops.testing.sanitizer import sanitized
from moe_ops.testing.strategies import assert_result, build, calls, formats
from moe_ops.tuning import TileConfig
from tests.cases import run
from tests.fuzz import drawing

EXAMPLES = int(os.environ.get("MOE_OPS_FUZZ_EXAMPLES", "40"))
# Without a sort: fewer and larger programs than the heuristic's, as the interpreter's time goes by the number of steps.
DIRECT = TileConfig(1, 64, 128)
QUANTIZED = {"max_size": 288, "max_tokens": 24, "max_experts": 5, "quantized": formats()}
CASES = {
    "classic": ("sorted", None, calls(tma=False)),
    "classic_direct": ("direct", DIRECT, calls(tma=False, max_tokens=4)),
    "tma": ("sorted", None, calls()),
    "tma_direct": ("direct", DIRECT, calls(max_tokens=4)),
}
QUANTIZED_CASES = {
    "classic_quantized": ("sorted", None, calls(tma=False, **QUANTIZED)),
    "classic_quantized_direct": ("direct", DIRECT, calls(tma=False, **QUANTIZED | {"max_tokens": 4})),
    "tma_quantized": ("sorted", None, calls(**QUANTIZED)),
}


@pytest.mark.parametrize("name", [*CASES, *QUANTIZED_CASES])
@pytest.mark.timeout(600 + EXAMPLES)
def test_drawn_calls(name):
    cases = CASES if name in CASES else QUANTIZED_CASES
    variant, config, drawn = cases[name]

    @drawing(EXAMPLES, len(cases), same_up_to=300)
    @given(drawn)
    def holds(call):
        args = build(call)
        with override(path=name.split("_")[0], variant=variant, config=config), sanitized():
            out = run(args)
        assert_result(out, args)

    holds()
