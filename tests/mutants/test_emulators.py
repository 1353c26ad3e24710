"""The rule of correctness takes the right emulator for right, and every wrong one for wrong."""

import pytest

from moe_ops.testing import emulate
from tests.mutants.emulators import INPUTS, QUANTIZED_INPUTS, WRONG, inputs, passes


@pytest.mark.parametrize("name,dtype", [*INPUTS, *QUANTIZED_INPUTS], ids=str)
def test_the_right_emulator_passes(name, dtype):
    assert passes(emulate(inputs(name, dtype)), name, dtype)


@pytest.mark.parametrize("wrong,dtype", [(w, dtype) for w in WRONG for dtype in w.dtypes], ids=str)
def test_a_wrong_emulator_does_not(wrong, dtype):
    names = [name for name, of in wrong.inputs if of == dtype]
    assert any(not passes(wrong(inputs(name, dtype)), name, dtype) for name in names)
