"""What a quantised call is made of: the checked form of `quantization`, `block_shape` and the scales' shapes.

K is the reduction dimension of a weight [E, N, K] (H for w1, I for w2), N its rows (2 * I or I for w1, H for w2).

    format        weight                   scale                                        activations
    fp8_w8a8      e4m3fn or e5m2 [E, N, K]  [E]; [E, N]; [E, N/128, K/128] (blocks)      e4m3fn, static or dynamic
    int8_w8a8     int8 [E, N, K]            [E, N]; [E, N/128, K/128] (blocks)           int8, dynamic
    int8_w8a16    int8 [E, N, K]            [E, N]; [E, N, K/g] (groups)                 16 bits
    int4_w4a16    uint8 [E, N, K/2]         [E, N, K/g] (groups)                         16 bits
    mxfp4_w4a16   uint8 [E, N, K/2]         [E, N, K/32], e8m0                           16 bits
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_ops.arguments import Arguments
from moe_ops.checks import either, require, require_dtype, require_ndim, require_shape

FORMATS = ("none", "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16")
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements along K that share a scale of the quantised activations, where they are in groups.
GROUP = 128
MX_GROUP = 32

WEIGHT_DTYPES = {
    "fp8_w8a8": (torch.float8_e4m3fn, torch.float8_e5m2),
    "int8_w8a8": (torch.int8,),
    "int8_w8a16": (torch.int8,),
    "int4_w4a16": (torch.uint8,),
    "mxfp4_w4a16": (torch.uint8,),
}
_INPUT_DTYPES = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8}
# 2^31 / (128 * 127), down to a power of two.
_LONGEST_INT8_SUM = 2**17
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_SCALES = ("w1_scale", "w2_scale")
_ZERO_POINTS = ("w1_zero_point", "w2_zero_point")
_ACTIVATION_SCALES = ("a1_scale", "a2_scale")


@dataclass(frozen=True)
class Scheme:
    """How the weights and the activations of a call are quantised.

    Attributes:
        name: the op's `quantization`.
        packed: two weights in a byte, along K, the even one in the low nibble.
        scale_rows: rows of a weight that share a scale; 0: all of an expert.
        scale_columns: columns (of K) that share a scale; 0: all.
        zero_points: the weights have zero points, with the same groups.
        inputs: scales of the quantised hidden states: "" (not quantised), "tensor", "token" or "group" (of 128).
        inputs_given: the hidden states arrive quantised.
        act: scales of the quantised activation: "", "tensor" or "expert" (both given), "token" or "group".
    """

    name: str = "none"
    packed: bool = False
    scale_rows: int = 1
    scale_columns: int = 0
    zero_points: bool = False
    inputs: str = ""
    inputs_given: bool = False
    act: str = ""

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised."""
        return self.name != "none"

    @property
    def row_dtype(self) -> torch.dtype | None:
        """The dtype the rows of both GEMMs are quantised to; None where they stay in the compute dtype."""
        return _INPUT_DTYPES.get(self.name)

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the hidden states have to be quantised."""
        return self.inputs != "" and not self.inputs_given

    @property
    def weights_only(self) -> bool:
        """Whether the weights are quantised and the rows are not."""
        return self.quantized and self.row_dtype is None

    @property
    def planes(self) -> int:
        """Weights in one element of what is stored."""
        return 2 if self.packed else 1

    def columns(self, stored: int) -> int:
        """Columns of a weight that stores so many."""
        return 2 * stored if self.packed else stored


UNQUANTIZED = Scheme()


def make_scheme(args: Arguments) -> Scheme:
    """Reads the scheme off a call, and checks what does not need its sizes.

    Args:
        args: the call; `quantization` is one of `FORMATS`.

    Returns:
        Its scheme.

    Raises:
        ValueError: an argument that the format does not use, or needs and has not; a wrong block shape.
        TypeError: a dtype is wrong.
    """
    name = args.quantization
    if name == "none":
        for given in (*_SCALES, *_ZERO_POINTS, *_ACTIVATION_SCALES, "block_shape"):
            if getattr(args, given) is not None:
                raise ValueError(f"{given} was given, but quantization is 'none' and does not use it; leave it out")
        return UNQUANTIZED
    _check_dtypes(args)
    for given in _SCALES:
        if getattr(args, given) is None:
            raise ValueError(f"{given} is None, and quantization={name!r} needs it; pass the scales of {given[:2]}")
    per_tensor = args.w1_scale is not None and args.w1_scale.ndim == 1
    rows, columns = scale_block(name, args.block_shape, per_tensor)
    zero_points = _has_zero_points(args, columns)
    weights_only = name not in _INPUT_DTYPES
    if weights_only:
        for given in _ACTIVATION_SCALES:
            if getattr(args, given) is not None:
                raise ValueError(f"{given} was given, but quantization={name!r} keeps 16-bit activations; leave it out")
    inputs, inputs_given = ("", False) if weights_only else _inputs(args, columns)
    return Scheme(
        name=name,
        packed=name in ("int4_w4a16", "mxfp4_w4a16"),
        scale_rows=rows,
        scale_columns=columns,
        zero_points=zero_points,
        inputs=inputs,
        inputs_given=inputs_given,
        act="" if weights_only else _act(args, columns),
    )


def check_scales(args: Arguments, scheme: Scheme, w1_rows: int) -> None:
    """Checks the shapes of a quantised call's scales and zero points.

    Args:
        args: the call; the shapes of its other tensors are checked.
        scheme: of the call.
        w1_rows: rows of w1.

    Raises:
        ValueError: a shape is wrong; the message says what was expected.
    """
    (num_tokens, hidden), experts = args.hidden_states.shape, args.w1.shape[0]
    intermediate = scheme.columns(args.w2.shape[2])
    if scheme.name == "int8_w8a8":
        for which, size in (("hidden_states: H", hidden), ("w2: I", intermediate)):
            message = (
                "{} is {}, expected at most {}, whose int8 products int32 can add up; use quantization='int8_w8a16'"
            )
            require(size <= _LONGEST_INT8_SUM, partial(message.format, which, size, _LONGEST_INT8_SUM))
    for which, rows, columns in (("w1", w1_rows, hidden), ("w2", hidden, intermediate)):
        shape, form = scale_shape(scheme, experts, rows, columns)
        require_shape(f"{which}_scale", getattr(args, f"{which}_scale"), shape, form)
        if scheme.zero_points:
            half = -(-rows // 2) if scheme.packed else rows
            form = "[E, N / 2, K / g], packed along N" if scheme.packed else "[E, N, K / g]"
            require_shape(f"{which}_zero_point", getattr(args, f"{which}_zero_point"), (experts, half, shape[2]), form)
    if args.a1_scale is not None:
        shapes = {
            "tensor": ((1,), "[1]"),
            "token": ((num_tokens, 1), "[M, 1]"),
            "group": ((num_tokens, -(-hidden // GROUP)), "[M, H / 128]"),
        }
        require_shape("a1_scale", args.a1_scale, *shapes[scheme.inputs])
    if args.a2_scale is not None:
        require_ndim("a2_scale", args.a2_scale, "[1] or [E]")
        size = args.a2_scale.shape[0]
        require(
            size == (1 if scheme.act == "tensor" else experts),
            lambda: f"a2_scale has shape [{size}], expected [1] or [E] = [{experts}]",
        )


def scale_shape(scheme: Scheme, experts: int, rows: int, columns: int) -> tuple[tuple[int, ...], str]:
    """The shape of a weight's scales, and how docs/quantization.md writes it."""
    if scheme.scale_rows == 0:
        return (experts,), "[E], a scale per tensor"
    if scheme.scale_columns == 0:
        return (experts, rows), "[E, N], a scale per row of the weight; scales of blocks or groups need block_shape"
    blocks = -(-rows // scheme.scale_rows), -(-columns // scheme.scale_columns)
    return (experts, *blocks), f"[E, ceil(N / {scheme.scale_rows}), ceil(K / {scheme.scale_columns})]"


def _check_dtypes(args: Arguments) -> None:
    name = args.quantization
    allowed = WEIGHT_DTYPES[name]
    for which in ("w1", "w2"):
        cure = f"quantise it (a cast loses its numbers): moe_ops.quantization.quantize_weights({which}, {name!r}, ...)"
        require_dtype(which, getattr(args, which), allowed, f" for quantization={name!r}", cure)
    if args.w1.dtype != args.w2.dtype:
        raise TypeError(f"w2 has dtype {args.w2.dtype}, expected {args.w1.dtype}, the dtype of w1; convert one of them")
    scales = _E8M0 if name == "mxfp4_w4a16" else (torch.float32, torch.bfloat16, torch.float16)
    of_scales = "pass the exponents that quantize_weights or the checkpoint has" if scales is _E8M0 else None
    for which in _SCALES:
        if getattr(args, which) is not None:
            require_dtype(which, getattr(args, which), scales, f" for quantization={name!r}", of_scales)
    for which in _ZERO_POINTS:
        if getattr(args, which) is not None:
            require_dtype(which, getattr(args, which), (torch.uint8,))
    for which in _ACTIVATION_SCALES:
        if getattr(args, which) is not None:
            require_dtype(which, getattr(args, which), (torch.float32,))


def scale_block(name: str, block_shape: Sequence[int] | None, per_tensor: bool = False) -> tuple[int, int]:
    """(rows, columns) of a weight that share a scale; 0 for all.

    Args:
        name: the format.
        block_shape: the op's.
        per_tensor: a scale per tensor where the format has that and there are no blocks.

    Raises:
        ValueError: a block shape that the format does not have, or none where it needs one.
    """
    block = None if block_shape is None else tuple(block_shape)
    if name in _INPUT_DTYPES:
        if block is None:
            return (0, 0) if name == "fp8_w8a8" and per_tensor else (1, 0)
        return _expect_block(block, name, ((GROUP, GROUP),))
    if name == "mxfp4_w4a16":
        return (1, MX_GROUP) if block is None else (1, _expect_block(block, name, ((0, MX_GROUP),))[1])
    if block is None:
        if name == "int8_w8a16":
            return 1, 0
        raise ValueError(
            f"block_shape is None, and quantization={name!r} needs groups; pass [0, 32], [0, 64] or [0, 128]"
        )
    return 1, _expect_block(block, name, ((0, 32), (0, 64), (0, 128)))[1]


def _expect_block(block: tuple[int, ...], name: str, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    for shape in allowed:
        if block == shape:
            return shape
    forms = either([list(shape) for shape in allowed])
    raise ValueError(f"block_shape is {list(block)}, expected {forms} for quantization={name!r}")


def _has_zero_points(args: Arguments, columns: int) -> bool:
    given = [name for name in _ZERO_POINTS if getattr(args, name) is not None]
    if not given:
        return False
    if args.quantization not in ("int8_w8a16", "int4_w4a16"):
        raise ValueError(f"{given[0]} was given, but quantization={args.quantization!r} has none; leave it out")
    if columns == 0:
        raise ValueError(f"{given[0]} was given without groups; pass block_shape=[0, g] and scales [E, N, K / g]")
    if len(given) == 1:
        raise ValueError(f"{given[0]} was given alone; pass both zero points, or none (symmetric)")
    return True


def _inputs(args: Arguments, columns: int) -> tuple[str, bool]:
    """(scales of the quantised hidden states, whether they arrive quantised)."""
    dtype, quantized, scale = args.hidden_states.dtype, _INPUT_DTYPES[args.quantization], args.a1_scale
    dynamic = "group" if columns else "token"
    if dtype == quantized:
        if scale is None:
            raise ValueError(
                f"a1_scale is None, and hidden_states are quantised ({dtype}); pass their scales, or 16-bit ones"
            )
        if scale.ndim == 1:
            return "tensor", True
        require_ndim("a1_scale", scale, "[M, H / 128]" if columns else "[M, 1]")
        return dynamic, True
    if scale is None:
        return dynamic, False
    if args.quantization != "fp8_w8a8":
        raise ValueError(
            f"a1_scale was given with hidden_states in {dtype}, and quantization={args.quantization!r} quantises them "
            f"by itself; leave it out, or pass {quantized}"
        )
    if columns:
        raise ValueError(
            "a1_scale was given with 16-bit hidden_states, and block scales need groups of 128, which the op makes; "
            f"leave it out, or pass hidden_states in {quantized}"
        )
    return "tensor", False


def _act(args: Arguments, columns: int) -> str:
    if args.a2_scale is None:
        return "group" if columns else "token"
    if args.quantization != "fp8_w8a8" or columns:
        what = "block scales" if columns else f"quantization={args.quantization!r}"
        raise ValueError(f"a2_scale was given, but with {what} the op scales the activation itself; leave it out")
    # One expert has one scale either way.
    return "tensor" if args.a2_scale.numel() == 1 else "expert"
