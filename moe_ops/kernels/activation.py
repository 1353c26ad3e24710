"""Activations in registers, fp32. The definitions are those of `moe_ops.reference`."""

import triton
import triton.language as tl

# 1 / (1 + exp(-x)), with approximations of which subnormal results are 0.
_LOGISTIC = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def nonlinearity(x, ACTIVATION: tl.constexpr, alpha, PTX: tl.constexpr = False):
    """The pointwise part: silu, gelu, gelu_tanh, swigluoai or relu2, with or without `_no_gate`.

    PTX: of a kernel for NVIDIA GPUs, for which exp and a division take twice as many instructions.
    """
    if ACTIVATION == "silu" or ACTIVATION == "silu_no_gate":
        y = _logistic(x, x, PTX)
    elif ACTIVATION == "gelu" or ACTIVATION == "gelu_no_gate":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        y = _logistic(x, 1.5957691216057308 * (x + 0.044715 * x * x * x), PTX)
    elif ACTIVATION == "swigluoai":
        y = _logistic(x, alpha * x, PTX)
    else:
        tl.static_assert(ACTIVATION == "relu2_no_gate", "unknown activation")
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    return y


@triton.jit
def _logistic(x, y, PTX: tl.constexpr):
    """x / (1 + exp(-y))"""
    if PTX:
        return x * tl.inline_asm_elementwise(_LOGISTIC, "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x / (1.0 + tl.exp(-y))


@triton.jit
def activate_gated(gate, up, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr, alpha, limit,
                   PTX: tl.constexpr = False):  # fmt: skip
    """nonlinearity(gate) * up, both clamped first where there is a limit; as in torch.clamp a NaN stays a NaN.

    PTX: as in `nonlinearity`.
    """
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == "swigluoai":
        up = up + 1.0
    return nonlinearity(gate, ACTIVATION, alpha, PTX) * up
