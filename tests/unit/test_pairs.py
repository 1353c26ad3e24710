"""The PTX that makes pairs of numbers of stored codes, run in Python: every code, in every place."""

import re

import pytest
import torch

tl = pytest.importorskip("triton.language")

from moe_ops.kernels import pairs
from moe_ops.quantization import dequantize

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MASK = 0xFFFFFFFF


def numbers(register: int, dtype: torch.dtype) -> torch.Tensor:
    """The two halves of a register, the low one first."""
    halves = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16)
    return halves.view(dtype)


def register(values: torch.Tensor) -> int:
    low, high = (int(half) & 0xFFFF for half in values.view(torch.int16))
    return high << 16 | low


def run(ptx: str, dtype: torch.dtype, *operands: int) -> int:
    """Runs straight-line PTX of shifts, logic, products and fma of pairs; the result is $0."""
    values = {f"${i}": operand for i, operand in enumerate(operands, 1)}

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in ptx.strip("{ }").split(";"):
        words = re.split(r"[\s,]+", line.strip())
        if not words[0] or words[0] == ".reg":
            continue
        operation, target, *sources = words
        a, *rest = (value(source) for source in sources)
        match operation.split(".")[0], rest:
            case "mov", []:
                result = a
            case "shl", [b]:
                result = a << b
            case "shr", [b]:
                result = a >> b
            case "and", [b]:
                result = a & b
            case "mul", [b]:
                result = a * b
            case "lop3", [b, c, 0xEA]:
                result = a & b | c
            case "lop3", [b, c, 0x6A]:
                result = a & b ^ c
            case "fma", [b, c]:
                x, y, z = (numbers(n, dtype).double() for n in (a, b, c))
                result = register((x * y + z).to(dtype))
            case _:
                raise ValueError(line)
        values[target] = result & MASK
    return values["$0"]


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
    offset = register(torch.tensor([-less, -less]).to(dtype))
    for row, numbers_there in zip(stored.tolist(), expected, strict=True):
        operand = int.from_bytes(bytes(row), "little")
        for plane in range(planes):
            ptx = pairs.pair_code(name, DTYPES[dtype], plane, adds)
            made = numbers(run(ptx, dtype, operand, offset), dtype)
            assert made.tolist() == numbers_there[plane::planes].tolist(), (row, plane)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_keeps_the_sign_of_zero(dtype):
    a, b = torch.tensor([-0.0, 3.0]).to(dtype), torch.tensor([2.0, -0.5]).to(dtype)
    product = numbers(run(pairs.pair_product(DTYPES[dtype]), dtype, register(a), register(b)), dtype)
    assert torch.equal(product.view(torch.int16), (a * b).view(torch.int16))
