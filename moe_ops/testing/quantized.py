"""Quantised inputs for tests: every scale differs from its neighbours, so that a shifted or swapped one shows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.quantization import quantize_activations, quantize_weights
from moe_ops.testing.inputs import random_inputs

_ROWS = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8}
# Where static scales saturate: x ~ N(0, 1) almost never gets there, its activation with scaled weights seldom.
_LARGEST_INPUT, _LARGEST_ACTIVATION = 6.0, 64.0


def quantized_inputs(
    *,
    quantization: str,
    granularity: str | None = None,
    block_shape: Sequence[int] | None = None,
    zero_points: bool = False,
    weight_dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    inputs_given: bool | str = False,
    static: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
    n_major: bool = False,
    seed: int = 0,
    **inputs: Any,
) -> Arguments:
    """Draws a call as `random_inputs` does, quantises it, and multiplies every scale by a factor from 0.5 to 2.

    Args:
        quantization: the op's.
        granularity: of the weights' scales, as in `quantize_weights`: "tensor" or "channel".
        block_shape: the op's.
        zero_points: with zero points.
        weight_dtype: of the weights of fp8_w8a8; None for e4m3fn.
        scale_dtype: of the weights' scales; None for float32, and uint8 for mxfp4_w4a16.
        inputs_given: the hidden states arrive quantised: True with a scale per token, or per 128 columns where the
            weights have blocks; "tensor" with one. A 16-bit `dtype` is then that of the result.
        static: a2_scale is given, and a1_scale unless the hidden states arrive quantised: True with one for all
            experts, "expert" with a2_scale for each. For fp8_w8a8 without blocks.
        dtype: of the hidden states before they are quantised.
        n_major: weights as transposed views.
        seed: of the generators.
        **inputs: sizes and options, as `random_inputs`.

    Returns:
        The call's arguments.

    Raises:
        ValueError, TypeError: as `random_inputs` and `quantize_weights`.

    Example:
        >>> from moe_ops.testing import emulate, quantized_inputs
        >>> sizes = {"num_tokens": 3, "hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2}
        >>> args = quantized_inputs(quantization="int4_w4a16", block_shape=(0, 32), **sizes)
        >>> args.w1.shape, args.w1_scale.shape, emulate(args).shape
        (torch.Size([4, 64, 32]), torch.Size([4, 64, 2]), torch.Size([3, 64]))
    """
    if inputs_given and dtype != torch.float32:
        inputs.setdefault("out_dtype", dtype)
    args = random_inputs(dtype=dtype, seed=seed, **inputs)
    device = args.w1.device
    generator = torch.Generator(device=device).manual_seed(seed + 1)

    def varied(scale: Tensor) -> Tensor:
        if scale.dtype == torch.uint8:
            steps = torch.randint(-1, 2, scale.shape, generator=generator, device=device)
            return (scale.int() + steps).clamp(0, 254).to(torch.uint8)
        return scale * 2 ** (2 * torch.rand(scale.shape, generator=generator, device=device) - 1)

    options: dict[str, Any] = {"granularity": granularity, "block_shape": block_shape, "zero_points": zero_points}
    for which in ("w1", "w2"):
        made = quantize_weights(getattr(args, which), quantization, dtype=weight_dtype, **options)
        scale = varied(made.scale)
        if scale_dtype is not None:
            scale = scale.view(scale_dtype) if scale.dtype == torch.uint8 else scale.to(scale_dtype)
        weight = made.weight
        if n_major:
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        setattr(args, which, weight)
        setattr(args, f"{which}_scale", scale)
        setattr(args, f"{which}_zero_point", made.zero_point)
    args.quantization, args.block_shape = quantization, block_shape
    if static:
        largest = torch.finfo(torch.float8_e4m3fn).max
        args.a1_scale = torch.full((1,), _LARGEST_INPUT / largest, device=device)
        experts = args.w1.shape[0] if static == "expert" else 1
        args.a2_scale = varied(torch.full((experts,), _LARGEST_ACTIVATION / largest, device=device))
    if inputs_given:
        rows, given = _ROWS[quantization], None
        if inputs_given == "tensor":
            limit = torch.finfo(rows).max if rows.is_floating_point else 127
            given = torch.full((1,), _LARGEST_INPUT / limit, device=device)
        by_group = "token" if block_shape is None else "group"
        args.hidden_states, scale = quantize_activations(args.hidden_states, rows, by_group, given)
        args.a1_scale = varied(scale)
    return args
