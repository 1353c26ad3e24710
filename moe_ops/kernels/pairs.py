"""Two weights at once, in PTX: codes of 4 or 8 bits to pairs of bfloat16 or float16, in the two halves of a register.

Triton makes such numbers one by one, through fp32: 6 instructions and more each. Here an element of 16 bits has 4 codes
of 4 bits, or 2 of 8, and two elements side by side are a register; the same code of both becomes a pair, because a
number's fields can be put together from bits where they are:

    int4    bf16  0x4300 | q                     128 + q, and less 128 + zero point     shift, lop3, fma
            fp16  0x6400 | q                    1024 + q
    int8    bf16  0x4300 | low 7 bits            128 + those, less 128 or 256 (0x4300 | sign bit: 0x4300 or 0x4380)
            fp16  0x6400 | (q ^ 0x80)           1024 + 128 + q
    e2m1    sign to the sign; exponent and mantissa to the lowest exponent bits and the highest of the mantissa:
            a number 2^126 (bf16) or 2^14 (fp16) too small, subnormal 0.5 included, times that power

All of it is exact: integers are at most 256 (bf16 has 8 bits of significand) or 2048 (fp16: 11). `mul` and `sub` of
pairs of bfloat16 need compute capability 9.0; fma has them on 8.0 (a product is fma with -0: it keeps the sign of 0).
"""

import triton
import triton.language as tl

from moe_ops.kernels.compat import INTERPRETED

_ONE = {"bf16": 0x3F80, "f16": 0x3C00}
_MINUS_ZERO = 0x8000
# Of pairs of factors of `scaled_e2m1`: the first that is no number, and that of a NaN's e.
_LARGE, _NAN = "0x7f800000", "0xbe80be80"


@triton.constexpr_function
def _both(half: int) -> str:
    return f"0x{half << 16 | half:08x}"


@triton.constexpr_function
def _name(dtype) -> str:
    return "bf16" if dtype == tl.bfloat16 else "f16"


@triton.constexpr_function
def in_pairs(stored, dtype) -> bool:
    """Whether elements of this stored dtype become pairs of `dtype`; the interpreter runs no PTX."""
    return stored == tl.int16 and dtype in (tl.bfloat16, tl.float16) and not INTERPRETED


@triton.constexpr_function
def pair_offset(FORMAT: str, dtype) -> float:
    """What `pair_code` has too much before it adds its second operand."""
    if FORMAT == "int4_w4a16":
        return 128.0 if dtype == tl.bfloat16 else 1024.0
    return 0.0 if FORMAT == "mxfp4_w4a16" or dtype == tl.bfloat16 else 1152.0


@triton.constexpr_function
def adds(FORMAT: str, dtype, ZERO: bool) -> bool:
    """Whether `pair_code` has a second operand to add: what it has too much, the middle of the codes, a zero point."""
    return ZERO or FORMAT == "int4_w4a16" or (FORMAT == "int8_w8a16" and dtype == tl.float16)


@triton.constexpr_function
def pair_code(FORMAT: str, dtype, plane: int, ADDS: bool) -> str:
    """PTX of $0 = the numbers of a plane of $1, plus $2 if ADDS."""
    name = _name(dtype)
    if FORMAT == "mxfp4_w4a16":
        return _e2m1(name, plane)
    bits = 4 if FORMAT == "int4_w4a16" else 8
    magic = 0x4300 if name == "bf16" else 0x6400
    body = f"shr.b32 q, $1, {bits * plane};"
    if FORMAT == "int4_w4a16":
        body += f"lop3.b32 a, q, {_both(15)}, {_both(magic)}, 0xea;"  # (q & 15) | magic
    elif name == "f16":
        body += f"lop3.b32 a, q, {_both(255)}, {_both(magic | 0x80)}, 0x6a;"  # (q & 255) ^ (magic | 128)
    else:
        body += f"lop3.b32 a, q, {_both(127)}, {_both(magic)}, 0xea; lop3.b32 b, q, {_both(128)}, {_both(magic)}, 0xea;"
        body += f"mov.b32 one, {_both(_ONE[name] | 0x8000)}; fma.rn.bf16x2 a, b, one, a;"
    body += f"mov.b32 one, {_both(_ONE[name])}; fma.rn.{name}x2 $0, a, one, $2;" if ADDS else "mov.b32 $0, a;"
    return "{ .reg .b32 q, a, b, one; " + body + " }"


@triton.constexpr_function
def _e2m1(name: str, plane: int) -> str:
    if name == "bf16":
        # Of planes 2 and 3 first 8 bits down: their shift is one. Then the code alone, times two powers of two: bit 3
        # comes to bit 15, and bits 2 to 0 to bits 8 to 6.
        at = 4 * (plane % 2)
        body = "shr.b32 t, $1, 8;" if plane > 1 else "mov.b32 t, $1;"
        body += f"and.b32 t, t, {_both(15 << at)}; mul.lo.u32 t, t, {(1 << 12 - at) + (1 << 6 - at)};"
        body += f"and.b32 t, t, {_both(0x81C0)};"
    else:
        # There the two would overlap: the code to bits 15 to 12, and what is not the sign 3 bits down.
        body = f"shl.b32 t, $1, {12 - 4 * plane}; shr.b32 u, t, 3; and.b32 u, u, {_both(0x0E00)};"
        body += f"lop3.b32 t, t, {_both(0x8000)}, u, 0xea;"  # (t & sign) | u
    power = (126 + 127) << 7 if name == "bf16" else (14 + 15) << 10
    body += f"mov.b32 power, {_both(power)}; mov.b32 zero, {_both(_MINUS_ZERO)};"
    return "{ .reg .b32 t, u, power, zero; " + body + f" fma.rn.{name}x2 $0, t, power, zero; }}"


@triton.constexpr_function
def pair_product(dtype) -> str:
    """PTX of $0 = $1 * $2."""
    return f"{{ .reg .b32 zero; mov.b32 zero, {_both(_MINUS_ZERO)}; fma.rn.{_name(dtype)}x2 $0, $1, $2, zero; }}"


@triton.constexpr_function
def pair_sum_of_products() -> str:
    """PTX of $0 = $1 * $2 + $1 * $3, of bfloat16: $3 is what $2 is short of a factor of more bits."""
    body = f".reg .b32 less; mov.b32 less, {_both(_MINUS_ZERO)}; fma.rn.bf16x2 less, $1, $3, less;"
    return f"{{ {body} fma.rn.bf16x2 $0, $1, $2, less; }}"


@triton.constexpr_function
def load_code(bits: int) -> str:
    """PTX of $0 = the 8 or 16 bits at $1, or 0 where $2 is."""
    return f"{{ .reg .pred there; setp.ne.u32 there, $2, 0; mov.b32 $0, 0; @there ld.global.u{bits} $0, [$1]; }}"


@triton.constexpr_function
def scales_at_once(FORMAT: str, dtype) -> bool:
    """Whether weights become numbers and are scaled by one product, `scaled_e2m1`."""
    return FORMAT == "mxfp4_w4a16" and dtype == tl.bfloat16


@triton.constexpr_function
def scaled_e2m1(plane: int) -> str:
    """PTX of $0 to $7 = a plane of $16 to $23 in pairs of bfloat16, times scales, and $8 to $15 the next plane.

    $24 to $39: of each weight of a plane what `e2m1_factor` makes of its scale; rows take turns in pairs of weights.
    A factor is the scale times 2^126 where bfloat16 has that, up to a scale of 2. Above, the threads that have such a
    scale multiply again, first by 2^127.
    """
    body = ".reg .b32 t<16>, factor, zero, power; .reg .pred large, is;"
    body += f"mov.b32 zero, {_both(_MINUS_ZERO)}; mov.b32 power, {_both(254 << 7)};"
    factors = [24 + 2 * (i % 8) for i in range(16)]
    for i, factor in enumerate(factors):
        at, q = 4 * (i // 8), 16 + i % 8
        # Of planes 2 and 3 first 8 bits down, as in `_e2m1`.
        body += f"shr.b32 t{i}, ${q}, 8;" if plane > 1 else f"mov.b32 t{i}, ${q};"
        body += f"and.b32 t{i}, t{i}, {_both(15 << at)}; mul.lo.u32 t{i}, t{i}, {(1 << 12 - at) + (1 << 6 - at)};"
        body += f"and.b32 t{i}, t{i}, {_both(0x81C0)}; fma.rn.bf16x2 ${i}, t{i}, ${factor}, zero;"
    body += f"setp.ge.u32 large, ${factors[0]}, {_LARGE}; setp.ge.or.u32 large, ${factors[1]}, {_LARGE}, large;"
    body += "@!large bra done;"
    for i, factor in enumerate(factors):
        body += f"setp.eq.u32 is, ${factor}, {_NAN}; sub.u32 factor, ${factor}, {_both(0x3F80)};"
        body += f"selp.b32 factor, {_both(0x7FC0)}, factor, is; setp.ge.u32 is, ${factor}, {_LARGE};"
        body += f"fma.rn.bf16x2 t{i}, t{i}, power, zero; @is fma.rn.bf16x2 ${i}, t{i}, factor, zero;"
    return "{ " + body + " done: }"


@triton.constexpr_function
def scaled_operands() -> str:
    """Constraints of `scaled_e2m1`; what it writes is written before the last of its operands is read."""
    return ",".join(["=&r"] * 16 + ["r"] * 24)


@triton.jit
def e2m1_factor(scale):
    """What `scaled_e2m1` takes of e8m0 scales in an int32.

    Both halves have 128 * (e + 126): from 0 to 128 that is bfloat16's 2^(e - 1). Of a larger e it is what an unsigned
    comparison finds beyond the largest of them.
    """
    return scale * 0x00800080 + 0x3F003F00
