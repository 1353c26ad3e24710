"""Activations in registers, fp32. The definitions are those of `moe_ops.reference`."""

import triton
import triton.language as tl

from moe_ops.kernels.compat import tanh


@triton.jit
def nonlinearity(x, ACTIVATION: tl.constexpr, alpha):
    """The pointwise part: silu, gelu, gelu_tanh, swigluoai or relu2, with or without `_no_gate`."""
    if ACTIVATION == "silu" or ACTIVATION == "silu_no_gate":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu" or ACTIVATION == "gelu_no_gate":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "swigluoai":
        y = x / (1.0 + tl.exp(-alpha * x))
    else:
        tl.static_assert(ACTIVATION == "relu2_no_gate", "unknown activation")
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    return y


@triton.jit
def activate_gated(gate, up, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr, alpha, limit):
    """nonlinearity(gate) * up, both clamped first where there is a limit; as in torch.clamp a NaN stays a NaN."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == "swigluoai":
        up = up + 1.0
    return nonlinearity(gate, ACTIVATION, alpha) * up
