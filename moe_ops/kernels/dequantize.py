"""Weights of fewer bits, back to numbers in registers. The definitions are those of `moe_ops.quantization.dequantize`.

FORMAT is the op's `quantization`. What is stored is [N, K] of 8 bits each, or [N, K / 2] bytes with two weights each,
the even column in the low nibble.
"""

import triton
import triton.language as tl

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
def zero_values(zero_ptrs, rows, mask, FORMAT: tl.constexpr):
    """Zero points of rows of a weight; packed ones have two rows in a byte, the even one in the low nibble."""
    if FORMAT == "int4_w4a16":
        packed = tl.load(zero_ptrs, mask=mask, other=0).to(tl.int32)
        return ((packed >> (4 * (rows & 1))) & 15).to(tl.float32)
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
def dequantized(q, scale, zero, FORMAT: tl.constexpr, GROUPS: tl.constexpr):
    """A tile of stored weights [N, K or K / 2] with GROUPS scales and zero points in a row, as fp32. [N, K]

    scale and zero: [N, GROUPS]; zero may be a number, and scale None (then it comes after the product).
    """
    ROWS: tl.constexpr = q.shape[0]
    if FORMAT == "int4_w4a16" or FORMAT == "mxfp4_w4a16":
        COLUMNS: tl.constexpr = 2 * q.shape[1]
        values = tl.join(nibble_values(q & 15, FORMAT), nibble_values(q >> 4, FORMAT)).reshape(ROWS, COLUMNS)
    else:
        COLUMNS: tl.constexpr = q.shape[1]
        values = q.to(tl.float32)
    if scale is None:
        return values
    else:
        values = values.reshape(ROWS, GROUPS, COLUMNS // GROUPS)
        return ((values - zero) * scale[:, :, None]).reshape(ROWS, COLUMNS)
