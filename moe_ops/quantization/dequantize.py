"""From stored values and scales back to numbers: the definition of every weight format."""

import torch
from torch import Tensor

from moe_ops.checks import require_name
from moe_ops.quantization.scheme import FORMATS, MX_GROUP

# The values of e2m1, by their four bits: sign, exponent (2), mantissa (1).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255
# Zero points where none are given: the middle of the unsigned range.
INT4_ZERO, INT8_ZERO = 8, 128


def dequantize(
    weight: Tensor,
    scale: Tensor,
    quantization: str,
    *,
    block_shape: tuple[int, int] | None = None,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that quantised weights stand for.

    With the row n, the column k and their scale s::

        fp8_w8a8, int8_w8a8    w[n, k] * s
        int8_w8a16             (w[n, k] + 128 - z) * s, z = 128 without zero points
        int4_w4a16             (nibble[n, k] - z) * s, z = 8 without zero points
        mxfp4_w4a16            e2m1[n, k] * 2^(s - 127), NaN for s = 255

    Args:
        weight: [..., N, K], as the format stores it: [..., N, K / 2] for int4_w4a16 and mxfp4_w4a16 (or gpt-oss's
            [..., N, K / 32, 16] for the latter).
        scale: one per weight [...], per row [..., N], or per block [..., N / rows, K / columns].
        quantization: "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16" or "mxfp4_w4a16".
        block_shape: (rows, columns) of a block; 0 rows for groups along K in every row. Of no use without blocks.
        zero_point: uint8, [..., N, K / g], for int4_w4a16 [..., N / 2, K / g] packed along N.
        dtype: of the result, and of the arithmetic.

    Returns:
        [..., N, K] in `dtype`.

    Raises:
        ValueError: unknown format, or a block scale without its block shape.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import dequantize
        >>> packed = torch.tensor([[0x2F, 0x80]], dtype=torch.uint8)  # 15, 2, 0, 8: low nibbles first
        >>> dequantize(packed, torch.tensor([[0.5]]), "int4_w4a16", block_shape=(0, 32)).tolist()
        [[3.5, -3.0, -4.0, 0.0]]

    Source:
        OCP Microscaling Formats (MX) Specification 1.0 for e2m1 and e8m0.
    """
    require_name("quantization", quantization, FORMATS[1:])
    rows, columns = block_shape or (1, MX_GROUP)
    rows = max(1, rows)
    if quantization == "mxfp4_w4a16" and weight.ndim > scale.ndim:
        weight = weight.flatten(-2)
    values = _values(weight, quantization, dtype)
    if quantization == "mxfp4_w4a16":
        scale = _powers_of_2(scale, dtype)
    scale = scale.to(dtype)
    ndim = values.ndim
    if scale.ndim == ndim and block_shape is None and quantization != "mxfp4_w4a16":
        raise ValueError(f"scale has shape {list(scale.shape)}, a scale per block, and block_shape is None; pass it")
    if zero_point is not None:
        zeros = zero_point
        if quantization == "int4_w4a16":
            zeros = unpack(zeros.transpose(-1, -2)).transpose(-1, -2)[..., : values.shape[-2], :]
        values = values - spread(zeros.to(dtype), values.shape, 1, columns)
    elif quantization == "int4_w4a16":
        values = values - INT4_ZERO
    elif quantization == "int8_w8a16":
        values = values - INT8_ZERO
    if scale.ndim == ndim - 2:
        return values * scale[..., None, None]
    if scale.ndim == ndim - 1:
        return values * scale[..., None]
    return values * spread(scale, values.shape, rows, columns)


def unpack(packed: Tensor) -> Tensor:
    """Nibbles of bytes, [..., n] -> [..., 2 * n], the low nibble first; uint8.

    Args:
        packed: [..., n], uint8.

    Returns:
        [..., 2 * n], uint8: values from 0 to 15.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import unpack
        >>> unpack(torch.tensor([0x21, 0x43], dtype=torch.uint8)).tolist()
        [1, 2, 3, 4]
    """
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _values(weight: Tensor, quantization: str, dtype: torch.dtype) -> Tensor:
    """What is stored, without scales; int8_w8a16 from 0 to 255."""
    if quantization == "int4_w4a16":
        return unpack(weight).to(dtype)
    if quantization == "mxfp4_w4a16":
        table = torch.tensor(E2M1, dtype=dtype, device=weight.device)
        return table[unpack(weight).int()]
    values = weight.to(dtype)
    return values + INT8_ZERO if quantization == "int8_w8a16" else values


def _powers_of_2(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e8m0: 2^(s - 127), exact in float64 and float32, NaN for 255."""
    exponents = scale.view(torch.uint8).to(dtype)
    return torch.where(exponents == _E8M0_NAN, float("nan"), torch.exp2(exponents - _E8M0_BIAS))


def spread(blocks: Tensor, shape: torch.Size, rows: int, columns: int) -> Tensor:
    """A value per block -> one per element of `shape`; blocks at the end may be short."""
    wide = blocks.repeat_interleave(rows, -2) if rows > 1 else blocks
    wide = wide.repeat_interleave(columns, -1)
    return wide[..., : shape[-2], : shape[-1]]
