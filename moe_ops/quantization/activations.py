"""Quantisation of activations as the op does it: hidden states, and the activation between the two GEMMs."""

import torch
from torch import Tensor

from moe_ops.quantization.scheme import GROUP

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize_activations(
    x: Tensor, dtype: torch.dtype, granularity: str, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds rows to fp8 or int8, with scales of their own or given ones.

    ::

        scale = min(max |x|, largest float32) / Q, at least the smallest normal float32;  NaN where x has one
        q     = round(clamp(x / scale, -Q, Q)), to the nearest, ties to even;             Q = 448 (e4m3) or 127 (int8)

    A row of zeros has q = 0, by a given scale of 0 too: below the smallest normal float32 it is that which divides. An
    infinity becomes the largest number; a NaN stays visible, in int8 through the scale.

    Args:
        x: [M, K], any floating-point dtype; the arithmetic is float32.
        dtype: torch.float8_e4m3fn or torch.int8.
        granularity: "tensor" (`scale` is needed), "token" (one scale per row) or "group" (one per 128 columns).
        scale: a given scale that multiplies q: any shape that broadcasts with x, in place of one from the maxima.

    Returns:
        q [M, K] in `dtype`, and its float32 scales: [M, 1] or [M, ceil(K / 128)], or `scale` itself.

    Raises:
        ValueError: `granularity` is not one of the three, or "tensor" without a scale.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import quantize_activations
        >>> q, scale = quantize_activations(torch.tensor([[1.0, -254.0]]), torch.int8, "token")
        >>> q.tolist(), scale.tolist()
        ([[0, -127]], [[2.0]])
    """
    x = x.float()
    largest = _LARGEST[dtype]
    if scale is None:
        scale = _scales(x, largest, granularity)
    # NaN stays.
    tiny = torch.finfo(torch.float32).tiny
    wide = torch.where(scale.abs() < tiny, tiny, scale)
    if granularity == "group" and scale.shape[-1] != 1:
        wide = wide.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
    q = (x / wide).clamp(-largest, largest)
    if dtype == torch.int8:
        q = q.round().nan_to_num(nan=0.0)
    return q.to(dtype), scale


def _scales(x: Tensor, largest: float, granularity: str) -> Tensor:
    limits = torch.finfo(torch.float32)
    match granularity:
        case "token":
            groups = x.unsqueeze(1)
        case "group":
            groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        case _:
            raise ValueError(f"granularity is {granularity!r} without a scale, expected 'token' or 'group'")
    # torch.amax keeps a NaN.
    return (groups.abs().amax(-1).clamp(max=limits.max) / largest).clamp(min=limits.tiny)


def dequantize_activations(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale, with scales per tensor, per row [M, 1] or per 128 columns [M, ceil(K / 128)].

    Args:
        q: [M, K], quantised.
        scale: float32: [1], [M, 1] or [M, ceil(K / 128)].
        dtype: of the result, and of the arithmetic.

    Returns:
        [M, K] in `dtype`.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import dequantize_activations
        >>> dequantize_activations(torch.tensor([[3, -1]], dtype=torch.int8), torch.tensor([[0.5]])).tolist()
        [[1.5, -0.5]]
    """
    wide = scale.to(dtype)
    if scale.ndim == 2 and scale.shape[1] > 1:
        wide = wide.repeat_interleave(GROUP, -1)[:, : q.shape[1]]
    return q.to(dtype) * wide
