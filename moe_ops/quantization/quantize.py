"""From numbers to stored values and scales: weights as the op takes them, made once, ahead of the calls."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.checks import require_name
from moe_ops.quantization.dequantize import INT4_ZERO, INT8_ZERO, spread
from moe_ops.quantization.scheme import FORMATS, WEIGHT_DTYPES, scale_block

WEIGHT_GRANULARITIES = ("tensor", "channel")
_E2M1_LARGEST, _E2M1_EXPONENT = 6.0, 2
_E8M0_BIAS, _E8M0_NAN = 127, 255
# Half of the range -8 .. 7, so that all 16 values are used: +-7.5 steps are rounded by half a step, as others may be.
_INT4_HALF = 7.5


class QuantizedWeights(NamedTuple):
    """Weights as the op takes them; see `quantize_weights`.

    Attributes:
        weight: w1 or w2, in the format's dtype and packing.
        scale: w1_scale or w2_scale.
        zero_point: w1_zero_point or w2_zero_point; None without zero points.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def quantize_weights(
    weight: Tensor,
    quantization: str,
    *,
    granularity: str | None = None,
    block_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    zero_points: bool = False,
) -> QuantizedWeights:
    """Rounds weights to a format of the op, to the nearest, ties to even.

    With the weights w that share a scale, and round(x, Q) = round(clamp(x, -Q, Q))::

        fp8_w8a8       s = max |w| / Q,     q = round(w / s, Q),        Q = 448 (e4m3fn) or 57344 (e5m2)
        int8           s = max |w| / 127,   q = round(w / s, 127)
        int4           s = max |w| / 7.5,   q = clamp(round(w / s), -8, 7),                  nibble = q + 8
        zero points    s = (h - l) / (2^bits - 1),   z = round(-l / s),   u = clamp(round(w / s + z), 0, 2^bits - 1)
                       with l = min(0, w...), h = max(0, w...);   int4: nibble = u,   int8: q = u - 128
        mxfp4_w4a16    s = 2^(floor(log2(max |w|)) - 2),   q = round(w / s, 6) in e2m1

    Scales of the first rows are at least the smallest normal float32, so zeros and tiny weights divide by something.
    An infinity counts as the largest float32. Where there is a NaN the scale is NaN, and all that shares it with it.
    `dequantize` of the result is within half a step of the weights, but for mxfp4_w4a16, which saturates values from
    6 s to 8 s.

    Args:
        weight: [..., N, K], any floating-point dtype and strides; the arithmetic is float32, one [N, K] at a time.
        quantization: "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16" or "mxfp4_w4a16".
        granularity: scales per "tensor" [...] (fp8_w8a8) or "channel" [..., N] (default); not with blocks or groups.
        block_shape: as the op's: (128, 128) for blocks of fp8_w8a8 and int8_w8a8, (0, g) for groups along K, with g =
            32, 64 or 128, of int8_w8a16 and int4_w4a16.
        dtype: torch.float8_e4m3fn (default) or torch.float8_e5m2, for fp8_w8a8.
        zero_points: with zero points, one per group, for int8_w8a16 and int4_w4a16.

    Returns:
        The weights, contiguous, on the same device; float32 scales (mxfp4_w4a16: uint8, e8m0); uint8 zero points.

    Raises:
        ValueError: unknown format, or an option it does not have; empty weights; odd K where two share a byte.
        TypeError: `weight` is not floating-point, or `dtype` not one of the format's.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import dequantize, quantize_weights
        >>> w, scale, _ = quantize_weights(torch.tensor([[1.0, -0.5, 0.0, 7.5]]), "int4_w4a16", block_shape=(0, 32))
        >>> w, scale
        (tensor([[137, 248]], dtype=torch.uint8), tensor([[1.]]))
        >>> dequantize(w, scale, "int4_w4a16", block_shape=(0, 32))
        tensor([[1., 0., 0., 7.]])

    Source:
        mxfp4: OCP Microscaling Formats (MX) Specification 1.0, section 6.3.
    """
    require_name("quantization", quantization, FORMATS[1:])
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}, expected a floating-point dtype")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [..., N, K] with at least one element")
    if quantization in ("int4_w4a16", "mxfp4_w4a16") and weight.shape[-1] % 2:
        raise ValueError(f"weight has K = {weight.shape[-1]} columns, expected an even number: two share a byte")
    stored = _stored_dtype(quantization, dtype)
    rows, columns = _block(quantization, granularity, block_shape)
    if zero_points and (quantization not in ("int8_w8a16", "int4_w4a16") or columns == 0):
        raise ValueError(
            f"zero_points is True, and quantization={quantization!r} with block_shape={block_shape} has none; leave "
            "it out, or pass int8_w8a16 or int4_w4a16 and block_shape=(0, g)"
        )
    block = rows or weight.shape[-2], columns or weight.shape[-1]

    def quantize(matrix: Tensor) -> QuantizedWeights:
        matrix = matrix.float()
        if quantization == "mxfp4_w4a16":
            return _microscaled(matrix, block)
        if zero_points:
            return _asymmetric(matrix, block, quantization)
        weight, scale = _symmetric(matrix, block, quantization, stored)
        if columns == 0:
            scale = scale[0, 0] if rows == 0 else scale[:, 0]
        return QuantizedWeights(weight, scale)

    return per_matrix(quantize, weight)


def pack(values: Tensor) -> Tensor:
    """The inverse of `unpack`: pairs of 4-bit values as bytes, [..., n] -> [..., ceil(n / 2)], the first one low.

    Args:
        values: [..., n], integers from 0 to 15, any integer dtype; a last one without a partner gets a 0.

    Returns:
        [..., ceil(n / 2)], uint8.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import pack
        >>> [hex(byte) for byte in pack(torch.tensor([1, 2, 3])).tolist()]
        ['0x21', '0x3']
    """
    values = torch.nn.functional.pad(values.to(torch.uint8), (0, values.shape[-1] % 2))
    return values[..., ::2] | values[..., 1::2] << 4


def pack_zero_points(zeros: Tensor) -> Tensor:
    """Zero points of int4_w4a16, packed along N: [..., N, K / g] from 0 to 15 -> [..., ceil(N / 2), K / g]."""
    return pack(zeros.transpose(-1, -2)).transpose(-1, -2).contiguous()


def per_matrix(function: Callable[..., QuantizedWeights], *tensors: Tensor) -> QuantizedWeights:
    """Applies a function of matrices to the leading dimensions of tensors [..., n, m], one after the other.

    The function's own memory is then that of one expert, not of all.
    """
    leading = tensors[0].shape[:-2]
    flat = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]
    results: dict[str, Tensor] = {}
    for i, matrices in enumerate(zip(*flat, strict=True)):
        parts = function(*matrices)._asdict()
        for name, part in parts.items():
            if part is not None:
                if i == 0:
                    results[name] = part.new_empty(len(flat[0]), *part.shape)
                results[name][i] = part
    return QuantizedWeights(**{name: made.view(leading + made.shape[1:]) for name, made in results.items()})


def _stored_dtype(quantization: str, dtype: torch.dtype | None) -> torch.dtype:
    allowed = WEIGHT_DTYPES[quantization]
    if dtype is None:
        return allowed[0]
    if dtype not in allowed:
        raise TypeError(f"dtype is {dtype}, expected {' or '.join(map(str, allowed))} for {quantization!r}")
    return dtype


def _block(quantization: str, granularity: str | None, block_shape: Sequence[int] | None) -> tuple[int, int]:
    """(rows, columns) that share a scale; 0 for all."""
    if granularity is not None:
        require_name("granularity", granularity, WEIGHT_GRANULARITIES)
        if block_shape is not None or quantization == "mxfp4_w4a16":
            raise ValueError(f"granularity is {granularity!r}, and the scales are those of blocks; leave it out")
        if granularity == "tensor" and quantization != "fp8_w8a8":
            raise ValueError(f"granularity is 'tensor', which {quantization!r} does not have; pass 'channel'")
    return scale_block(quantization, block_shape, granularity == "tensor")


def _blocked(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] -> [N / rows, rows, K / columns, columns], with zeros at the ends."""
    rows, columns = block
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _largest(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """max |w| of every block; NaN where there is one, and finite where there is an infinity."""
    # torch.amax keeps a NaN.
    return _blocked(matrix, block).abs().amax((1, 3)).clamp(max=torch.finfo(torch.float32).max)


def _nonzero(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def _symmetric(matrix: Tensor, block: tuple[int, int], quantization: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = _largest(matrix, block)
    if quantization == "fp8_w8a8":
        most = torch.finfo(dtype).max
        scale = _nonzero(largest / most)
        return (matrix / spread(scale, matrix.shape, *block)).clamp(-most, most).to(dtype), scale
    if quantization == "int4_w4a16":
        scale = _nonzero(largest / _INT4_HALF)
        return pack(_rounded(matrix / spread(scale, matrix.shape, *block), -8, 7) + INT4_ZERO), scale
    scale = _nonzero(largest / 127)
    return _rounded(matrix / spread(scale, matrix.shape, *block), -127, 127).to(torch.int8), scale


def _asymmetric(matrix: Tensor, block: tuple[int, int], quantization: str) -> QuantizedWeights:
    most = 15 if quantization == "int4_w4a16" else 255
    limit = torch.finfo(torch.float32).max
    blocks = _blocked(matrix, block)
    # 0 is in every range: else the zero point of weights that are all large would be no number of the format.
    low, high = blocks.amin((1, 3)).clamp(-limit, 0), blocks.amax((1, 3)).clamp(0, limit)
    scale = _nonzero(high / most - low / most)
    zeros = _rounded(-low / scale, 0, most)
    values = _rounded(matrix / spread(scale, matrix.shape, *block) + spread(zeros, matrix.shape, *block), 0, most)
    if quantization == "int4_w4a16":
        return QuantizedWeights(pack(values), scale, pack_zero_points(zeros))
    return QuantizedWeights((values - INT8_ZERO).to(torch.int8), scale, zeros.to(torch.uint8))


def _rounded(values: Tensor, low: int, high: int) -> Tensor:
    """To the nearest integer, ties to even; a NaN, which the scale shows, to 0."""
    return values.round().clamp(low, high).nan_to_num(nan=0.0)


def _microscaled(matrix: Tensor, block: tuple[int, int]) -> QuantizedWeights:
    largest = _largest(matrix, block)
    # x = m * 2^e with 0.5 <= m < 1, and e = 0 for 0.
    exponents = (torch.frexp(largest).exponent - 1 - _E2M1_EXPONENT).clamp(min=-_E8M0_BIAS)
    scale = torch.where(largest.isnan(), _E8M0_NAN, exponents + _E8M0_BIAS).to(torch.uint8)
    # In float64, where all powers are normal numbers.
    powers = torch.exp2(-exponents.double())
    magnitudes = (matrix.abs().double() * spread(powers, matrix.shape, *block)).nan_to_num(nan=0.0)
    magnitudes = magnitudes.clamp(max=_E2M1_LARGEST)
    # The distance of e2m1's neighbours; round() to an even multiple of it is e2m1's tie to an even mantissa.
    step = torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0))
    magnitudes = (magnitudes / step).round() * step
    codes = torch.where(magnitudes < 2, 2 * magnitudes, torch.where(magnitudes < 4, magnitudes + 2, magnitudes / 2 + 4))
    return QuantizedWeights(pack(codes + 8 * torch.signbit(matrix)), scale)
