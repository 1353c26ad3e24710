"""Weights of fewer bits, back to numbers in registers. The definitions are those of `moe_ops.quantization.dequantize`.

FORMAT is the op's `quantization`. What is stored is [N, K] of 8 bits each, or [N, K / 2] bytes with two weights each,
the even column in the low nibble.
"""

import triton
import triton.language as tl

from moe_ops.kernels.layout import by_unit
from moe_ops.kernels.pairs import adds, in_pairs, pair_code, pair_offset, pair_product

# The middle of the unsigned range, which int4 weights stand around where they have no zero points.
_INT4_ZERO = tl.constexpr(8.0)
_INT8_ZERO = tl.constexpr(128.0)
_E8M0_NAN = tl.constexpr(255)


@triton.jit
def nibble_values(q, FORMAT: tl.constexpr):
    """Values of nibbles (0 to 15, in any integer type) without scale and zero point, in fp32; int4 from 0 to 15."""
    if FORMAT == "int4_w4a16":
        return q.to(tl.float32)
    else:
        # e2m1's exponent and mantissa as the lowest of float32's exponent and the highest of its mantissa: a number
        # 2^126 too small, subnormal 0.5 included.
        q = q.to(tl.uint32)
        return (((q & 8) << 28) | ((q & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def scale_rows(rows, SCALE_ROWS: tl.constexpr):
    """Rows of a weight -> rows of its scales, SCALE_ROWS of the first to one of the second; 0: all to one."""
    if SCALE_ROWS > 0:
        return rows // SCALE_ROWS
    else:
        return rows * 0


@triton.jit
def zero_rows(rows, FORMAT: tl.constexpr):
    """Rows of a weight -> rows of its zero points, two in a byte where the weights are packed."""
    if FORMAT == "int4_w4a16":
        return rows // 2
    else:
        return rows


@triton.jit
def scale_values(scale, FORMAT: tl.constexpr):
    """Scales as stored -> fp32."""
    if FORMAT == "mxfp4_w4a16":
        e = scale.to(tl.uint32)
        # float32's own exponent field; 2^-127 is subnormal.
        power = tl.where(e == 0, 1 << 22, e << 23).to(tl.float32, bitcast=True)
        return tl.where(e == _E8M0_NAN, float("nan"), power)
    else:
        return scale.to(tl.float32)


@triton.jit
def scales_of(scale, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Scales as stored -> in `dtype` where it holds them exactly, else in fp32."""
    if FORMAT == "mxfp4_w4a16" and dtype == tl.bfloat16:
        e = scale.to(tl.int16)
        # bfloat16's exponent field; 2^-127 is subnormal, and the field of NaN alone would be infinity's.
        return tl.where(e == _E8M0_NAN, 0x7FC0, tl.maximum(e << 7, 1 << 6)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif FORMAT != "mxfp4_w4a16" and scale.dtype == dtype:
        return scale
    else:
        return scale_values(scale, FORMAT)


@triton.jit
def zero_values(zero_ptrs, rows, mask, FORMAT: tl.constexpr):
    """Zero points of rows of a weight; packed ones have two rows in a byte, the even one in the low nibble.

    Which nibble by two masks of loads: where weights become operands of the tensor cores, Triton follows what they are
    made of back to loads, and to nothing else.
    """
    if FORMAT == "int4_w4a16":
        odd = tl.load(zero_ptrs, mask=mask & (rows % 2 == 1), other=0).to(tl.int32)
        even = tl.load(zero_ptrs, mask=mask & (rows % 2 == 0), other=0).to(tl.int32)
        return ((odd >> 4) + (even & 15)).to(tl.float32)
    else:
        return tl.load(zero_ptrs, mask=mask, other=0).to(tl.float32) - _INT8_ZERO


@triton.jit
def no_zero(FORMAT: tl.constexpr):
    """The zero point where none is given, of the values as they are stored."""
    if FORMAT == "int4_w4a16":
        return _INT4_ZERO
    else:
        return 0.0


@triton.jit
def _by_parts(values, parts, PLANES: tl.constexpr):
    """values [N, S] and what their parts have [N, parts], in shapes that can be multiplied."""
    if PLANES > 1 and parts.shape[1] > 1:
        return by_unit(values, parts)
    else:
        SHAPE: tl.constexpr = (values.shape[0], parts.shape[1], values.shape[1] // parts.shape[1])
        return values.reshape(SHAPE), parts[:, :, None].broadcast_to(SHAPE)


@triton.jit
def plane_values(q, zero, plane: tl.constexpr, PLANES: tl.constexpr, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """A plane of a tile of stored weights [N, S] less the zero points, exactly, as numbers of `dtype`. [N, S]

    zero: fp32 [N, parts], or None.
    """
    if in_pairs(q.dtype, dtype):
        ADDS: tl.constexpr = adds(FORMAT, dtype, zero is not None)
        if ADDS:
            less = (no_zero(FORMAT) if zero is None else zero) + pair_offset(FORMAT, dtype)
            offset = tl.zeros((1, 1), dtype) + tl.cast(-less, dtype)
            q_parts, offset = _by_parts(q, offset, PLANES)
            code: tl.constexpr = pair_code(FORMAT, dtype, plane, ADDS)
            return tl.inline_asm_elementwise(code, "=r,r,r", [q_parts, offset], offset.dtype, True, 2).reshape(q.shape)
        else:
            return tl.inline_asm_elementwise(
                pair_code(FORMAT, dtype, plane, ADDS), "=r,r", [q], tl.zeros((1,), dtype).dtype, True, 2
            )
    BITS: tl.constexpr = q.dtype.primitive_bitwidth // PLANES
    if FORMAT == "int8_w8a16":
        # The highest bit is the sign.
        values = (((q.to(tl.int32) >> (BITS * plane)) & 255 ^ 128) - 128).to(tl.float32)
    else:
        values = nibble_values((q.to(tl.int32) >> (BITS * plane)) & 15, FORMAT)
    if zero is None:
        return (values - no_zero(FORMAT)).to(dtype)
    else:
        values, zero = _by_parts(values, zero, PLANES)
        return (values - zero).to(dtype).reshape(q.shape)


@triton.jit
def scaled(values, scale, stored: tl.constexpr, PLANES: tl.constexpr, dtype: tl.constexpr):
    """values from `plane_values` times scales [N, parts] from `scales_of`, rounded once to `dtype`. [N, S]"""
    SHAPE: tl.constexpr = values.shape
    values, scale = _by_parts(values, scale, PLANES)
    if in_pairs(stored, dtype) and scale.dtype == dtype:
        code: tl.constexpr = pair_product(dtype)
        return tl.inline_asm_elementwise(code, "=r,r,r", [values, scale], scale.dtype, True, 2).reshape(SHAPE)
    else:
        return (values.to(tl.float32) * scale.to(tl.float32)).to(dtype).reshape(SHAPE)
