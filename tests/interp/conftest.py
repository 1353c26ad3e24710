"""These tests run the Triton kernels in Triton's interpreter, which must be switched on before Triton is imported."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("tests/interp runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1", returncode=4)

from tests.interp.mended import mend

mend()
