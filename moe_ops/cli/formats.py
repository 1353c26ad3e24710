"""The quantised formats that are timed, and weights in them: as many experts as asked for, out of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest magnitudes that the static scales cover: x ~ N(0, 1), and the product of two such with silu.
_LARGEST_INPUT, _LARGEST_ACTIVATION = 6.0, 32.0
_SEED = 0


@dataclass(frozen=True)
class Format:
    """A quantised format.

    Attributes:
        quantization: the op's.
        block_shape: the op's.
        granularity: of the weights' scales where there are no blocks or groups: "tensor" or "channel".
        static: the scales of hidden states and activation are given.
    """

    quantization: str
    block_shape: Sequence[int] | None = None
    granularity: str | None = None
    static: bool = False

    @property
    def multiplies_bytes(self) -> bool:
        """Whether the GEMMs multiply fp8 or int8, weights and rows."""
        return self.quantization in ("fp8_w8a8", "int8_w8a8")


FORMATS = {
    "fp8_tensor": Format("fp8_w8a8", granularity="tensor"),
    "fp8_tensor_static": Format("fp8_w8a8", granularity="tensor", static=True),
    "fp8_channel": Format("fp8_w8a8", granularity="channel"),
    "fp8_block": Format("fp8_w8a8", (128, 128)),
    "int8_channel": Format("int8_w8a8", granularity="channel"),
    "int8_block": Format("int8_w8a8", (128, 128)),
    "int8_weights": Format("int8_w8a16", granularity="channel"),
    "int4": Format("int4_w4a16", (0, 128)),
    "int4_g32": Format("int4_w4a16", (0, 32)),
    "mxfp4": Format("mxfp4_w4a16"),
}


def quantized_weights(
    form: Format, experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: str
) -> dict[str, object]:
    """Weights of a gated block, their scales and whatever else the format needs, by argument name.

    One expert is drawn from N(0, 1 / K), as `moe_ops.testing.random_inputs` does, and quantised; every other one is
    the same with its rows, and the rows of its scales, moved on. The time and the power that a multiplication takes
    depend on the distribution of the values alone, and memory is needed for no more than the result and that expert.
    """
    generator = torch.Generator(device=device).manual_seed(_SEED)
    arguments = {"quantization": form.quantization, "block_shape": form.block_shape}
    for which, rows, columns in (("w1", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
        weight, scale = _one_expert(form, rows, columns, dtype, device, generator)
        arguments[which] = _moved_on(weight, experts)
        arguments[f"{which}_scale"] = _moved_on(scale, experts)
    if form.static:
        largest = torch.finfo(torch.float8_e4m3fn).max
        arguments["a1_scale"] = torch.full((1,), _LARGEST_INPUT / largest, device=device)
        arguments["a2_scale"] = torch.full((1,), _LARGEST_ACTIVATION / largest, device=device)
    return arguments


def _one_expert(
    form: Format, rows: int, columns: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    from moe_ops.quantization import quantize_weights

    drawn = (torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5).to(dtype)
    made = quantize_weights(drawn, form.quantization, granularity=form.granularity, block_shape=form.block_shape)
    return made.weight, made.scale


def _moved_on(one: Tensor, experts: int) -> Tensor:
    """[E, rows, ...] out of [rows, ...]: expert e has it rolled by e steps, all different if there are rows enough."""
    result = one.new_empty(experts, *one.shape)
    if one.ndim == 0:
        return result.copy_(one)
    source, target = one, result
    if one.element_size() == 1:  # not every torch copies parts of fp8 tensors on every device
        source, target = one.view(torch.uint8), result.view(torch.uint8)
    rows = one.shape[0]
    step = max(1, rows // experts)
    for expert in range(experts):
        shift = expert * step % rows
        target[expert, :shift] = source[rows - shift :]
        target[expert, shift:] = source[: rows - shift]
    return result
