"""Bad calls of the C++ kernel: the table that Python's checks are held against, in the same words."""

import pytest
import torch

from tests.unit.test_errors import CASES, H, I, M, good_call, good_route

# Words about Triton's interpreter, which only Python has.
NOT_SAID = ("TRITON_INTERPRET=1",)
CALLED = {"op": "fused_moe_tma", "out_op": "fused_moe_tma_", "route_op": "route"}


def callers(case) -> list[str]:
    return [caller for caller in case.callers if caller in CALLED]


def on_meta(call: dict) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in call.values())


def call_of(case, caller: str) -> dict:
    call = good_route() if caller == "route_op" else good_call()
    case.damage(call)
    if caller == "out_op":
        call.setdefault("out", torch.empty(M, H))
    return call


@pytest.mark.parametrize("case", [case for case in CASES if callers(case)], ids=lambda case: case.name)
def test_bad_call(ops, case):
    """Tensors on "meta" reach no kernel, and formats are refused whatever they hold."""
    for caller in callers(case):
        call = call_of(case, caller)
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            getattr(ops, CALLED[caller])(**call)
        message = str(raised.value)
        if on_meta(call):
            assert "Meta" in message
        elif call.get("quantization", "none") not in ("none", "fp4"):
            assert "expected 'none' in the C++ CPU kernel" in message
        else:
            assert [word for word in (case.argument, *case.words) if word not in message and word not in NOT_SAID] == []
    good = good_call()
    assert torch.isfinite(ops.fused_moe_tma(**good)).all()


def test_table_reaches_the_kernel():
    assert len([case for case in CASES if callers(case)]) >= 60


@pytest.mark.parametrize("quantization", ["fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16"])
def test_quantised_weights_are_refused(ops, quantization):
    call = good_call() | {"quantization": quantization, "w1_scale": torch.ones(4, 2 * I), "w2_scale": torch.ones(4, H)}
    with pytest.raises(RuntimeError, match=rf"quantization is '{quantization}', expected 'none'.*dequantise"):
        ops.fused_moe_tma(**call)
