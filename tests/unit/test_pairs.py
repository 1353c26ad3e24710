"""The PTX that makes pairs of numbers of stored codes, run in Python: every code, in every place."""

import numpy as np
import pytest
import torch

tl = pytest.importorskip("triton.language")

from moe_ops.kernels import pairs
from moe_ops.quantization import dequantize
from moe_ops.testing.hopper import ptx

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def numbers(registers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The two halves of registers, the low one first. [..., 2]"""
    return torch.from_numpy(registers.view(np.int32)).view(dtype).reshape(*registers.shape, 2)


def registers(values: torch.Tensor) -> np.ndarray:
    """Numbers of 16 bits [..., 2] in registers."""
    return values.contiguous().view(torch.int32)[..., 0].numpy().view(np.uint32)


def all_stored(bits: int) -> torch.Tensor:
    """[n, 4] bytes, two elements of 16 bits each: every code in every place, beside others."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (2**bits * 4, 4), generator=generator, dtype=torch.uint8)
    for place in range(4):
        rows = slice(place * 2**bits, (place + 1) * 2**bits)
        codes = torch.arange(2**bits, dtype=torch.uint8)
        stored[rows, place] = codes if bits == 8 else codes | codes.flip(0) << 4
    return stored


@pytest.mark.parametrize("zero", [None, 0, 3, 15])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4_w4a16", "mxfp4_w4a16", "int8_w8a16"])
def test_every_code(name, dtype, zero):
    if name == "mxfp4_w4a16" and zero is not None:
        return
    stored = all_stored(8 if name == "int8_w8a16" else 4)
    planes = 2 if name == "int8_w8a16" else 4
    weight = stored.view(torch.int8) if planes == 2 else stored
    scale = torch.ones(len(stored), 1)
    if name == "mxfp4_w4a16":
        scale = torch.full_like(scale, 127, dtype=torch.uint8)
    expected = dequantize(weight, scale, name, block_shape=(0, 32))
    middle = 8 if name == "int4_w4a16" else 0
    if zero is not None:
        expected = expected + middle - zero
    adds = pairs.adds(name, DTYPES[dtype], zero is not None)
    less = pairs.pair_offset(name, DTYPES[dtype]) + (middle if zero is None else zero)
    operand = stored.numpy().view(np.uint32)[:, 0]
    offset = np.full_like(operand, registers(torch.tensor([-less, -less]).to(dtype)))
    for plane in range(planes):
        (made,) = ptx.run(pairs.pair_code(name, DTYPES[dtype], plane, adds), [operand, offset], 1)
        assert torch.equal(numbers(made, dtype).float(), expected[:, plane::planes].float()), plane


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_keeps_the_sign_of_zero(dtype):
    a, b = torch.tensor([-0.0, 3.0]).to(dtype), torch.tensor([2.0, -0.5]).to(dtype)
    (product,) = ptx.run(pairs.pair_product(DTYPES[dtype]), [registers(a[None]), registers(b[None])], 1)
    assert torch.equal(numbers(product, dtype)[0].view(torch.int16), (a * b).view(torch.int16))
