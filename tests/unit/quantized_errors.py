"""Bad quantised calls, for the table of `test_errors.py`: (name, argument, damage, error, words)."""

from collections.abc import Callable, Iterator

import torch

from moe_ops.quantization import quantize_weights

FP8, INT8 = torch.float8_e4m3fn, torch.int8
BLOCKS, GROUPS = [128, 128], [0, 32]
# name: quantization, options of quantize_weights.
FORMATS = {
    "fp8": ("fp8_w8a8", {}),
    "fp8_tensor": ("fp8_w8a8", {"granularity": "tensor"}),
    "fp8_blocks": ("fp8_w8a8", {"block_shape": BLOCKS}),
    "int8": ("int8_w8a8", {}),
    "int8_weights": ("int8_w8a16", {}),
    "int8_groups": ("int8_w8a16", {"block_shape": GROUPS, "zero_points": True}),
    "int4": ("int4_w4a16", {"block_shape": GROUPS, "zero_points": True}),
    "mxfp4": ("mxfp4_w4a16", {}),
}


def quantised(name: str, **changes) -> Callable[[dict], None]:
    """Damage: quantises the weights, then changes arguments: to values, or by functions of what they are."""

    def damage(call: dict) -> None:
        quantization, options = FORMATS[name]
        call.update(quantization=quantization, block_shape=options.get("block_shape"))
        for which in ("w1", "w2"):
            made = quantize_weights(call[which], quantization, **options)
            call.update({which: made.weight, f"{which}_scale": made.scale, f"{which}_zero_point": made.zero_point})
        for argument, change in changes.items():
            call[argument] = change(call[argument]) if callable(change) else change

    return damage


def bad_calls(tokens: int, hidden: int, intermediate: int, experts: int) -> Iterator[tuple]:
    """The rows of the table, for a call of these sizes: less than a block each."""
    # fmt: off
    rows = 2 * intermediate
    for name, dtype, quantization in (
        ("fp8", "torch.float8_e4m3fn or torch.float8_e5m2", "fp8_w8a8"), ("int8", "torch.int8", "int8_w8a8"),
        ("int8_weights", "torch.int8", "int8_w8a16"), ("int4", "torch.uint8", "int4_w4a16"),
        ("mxfp4", "torch.uint8", "mxfp4_w4a16"),
    ):
        for which in ("w1", "w2"):
            yield (f"{name}-{which}-float", which, quantised(name, **{which: lambda x: x.float()}), TypeError,
                   f"{which} has dtype torch.float32", f"expected {dtype} for quantization='{quantization}'",
                   "a cast loses its numbers", f"moe_ops.quantization.quantize_weights({which}, '{quantization}', ...)")
            yield (f"{name}-{which}-no-scale", f"{which}_scale", quantised(name, **{f"{which}_scale": None}),
                   ValueError, f"{which}_scale is None", f"quantization='{quantization}' needs it",
                   f"pass the scales of {which}")
    yield ("fp8-two-dtypes", "w2", quantised("fp8", w2=lambda x: x.to(torch.float8_e5m2)), TypeError,
           "w2 has dtype torch.float8_e5m2", "expected torch.float8_e4m3fn, the dtype of w1", "convert one of them")

    # Scales and zero points: dtypes.
    for name, argument, dtype, expected, cure in (
        ("fp8", "w1_scale", torch.float64, "torch.float32 or torch.bfloat16 or torch.float16", "cast it"),
        ("int4", "w2_scale", torch.int32, "torch.float32 or torch.bfloat16 or torch.float16", "cast it"),
        ("mxfp4", "w1_scale", torch.float32, "torch.uint8 or torch.float8_e8m0fnu", "pass the exponents"),
        ("int4", "w1_zero_point", torch.int8, "torch.uint8", "cast it"),
        ("int8_groups", "w2_zero_point", torch.int32, "torch.uint8", "cast it"),
    ):
        yield (f"{name}-{argument}-{dtype}", argument, quantised(name, **{argument: lambda x, d=dtype: x.to(d)}),
               TypeError, f"{argument} has dtype {dtype}", f"expected {expected}", cure)
    for argument in ("a1_scale", "a2_scale"):
        yield (f"fp8-{argument}-float16", argument, quantised("fp8", **{argument: torch.ones(1).half()}), TypeError,
               f"{argument} has dtype torch.float16", "expected torch.float32", f"{argument}.to(torch.float32)")

    # Scales and zero points: shapes. K = H for w1 and I for w2.
    per_row = "[E, N], a scale per row of the weight; scales of blocks or groups need block_shape"
    blocks, groups = "[E, ceil(N / 128), ceil(K / 128)]", "[E, ceil(N / 1), ceil(K / 32)]"
    for name, argument, change, got, expected in (
        ("fp8", "w1_scale", lambda x: x[:, 1:], [experts, rows - 1], f"{[experts, rows]}: {per_row}"),
        ("fp8", "w1_scale", lambda x: x[..., None], [experts, rows, 1], f"{[experts, rows]}: {per_row}"),
        ("fp8", "w2_scale", lambda x: x[:, 0], [experts], f"{[experts, hidden]}: {per_row}"),
        ("fp8_tensor", "w2_scale", lambda x: x[1:], [experts - 1], f"{[experts]}: [E], a scale per tensor"),
        ("fp8_tensor", "w2_scale", lambda x: x[:, None], [experts, 1], f"{[experts]}: [E], a scale per tensor"),
        ("fp8_blocks", "w1_scale", lambda x: x[0], [1, 1], f"{[experts, 1, 1]}: {blocks}"),
        ("fp8_blocks", "w2_scale", lambda x: x.expand(-1, 2, 1), [experts, 2, 1], f"{[experts, 1, 1]}: {blocks}"),
        ("int8", "w1_scale", lambda x: x[:, 0], [experts], f"{[experts, rows]}: {per_row}"),
        ("int4", "w1_scale", lambda x: x.mT, [experts, 1, rows], f"{[experts, rows, 1]}: {groups}"),
        ("mxfp4", "w2_scale", lambda x: x.expand(-1, -1, 2), [experts, hidden, 2], f"{[experts, hidden, 1]}: {groups}"),
        ("int8_groups", "w1_zero_point", lambda x: x[:, 1:], [experts, rows - 1, 1],
         f"{[experts, rows, 1]}: [E, N, K / g]"),
        ("int4", "w1_zero_point", lambda x: x.repeat(1, 2, 1), [experts, rows, 1],
         f"{[experts, intermediate, 1]}: [E, N / 2, K / g], packed along N"),
    ):
        yield (f"{name}-{argument}-{'x'.join(map(str, got))}", argument, quantised(name, **{argument: change}),
               ValueError, f"{argument} has shape {got}", f"expected {expected}")

    # Zero points where there are none, without groups, or alone.
    zeros = torch.zeros(experts, rows, 1, dtype=torch.uint8)
    for name in ("fp8", "mxfp4"):
        yield (f"{name}-zero-point", "w1_zero_point", quantised(name, w1_zero_point=zeros), ValueError,
               "w1_zero_point was given", f"quantization='{FORMATS[name][0]}' has none", "leave it out")
    yield ("int8_weights-zero-point", "w1_zero_point", quantised("int8_weights", w1_zero_point=zeros), ValueError,
           "w1_zero_point was given without groups", "pass block_shape=[0, g] and scales [E, N, K / g]")
    for name, argument, other in (("int4", "w1_zero_point", "w2_zero_point"),
                                  ("int8_groups", "w2_zero_point", "w1_zero_point")):
        yield (f"{name}-{argument}-alone", argument, quantised(name, **{other: None}), ValueError,
               f"{argument} was given alone", "pass both zero points, or none")

    # Block shapes.
    for name, shape, expected in (
        ("fp8", [64, 128], "[128, 128]"), ("int8", [0, 128], "[128, 128]"), ("int8_groups", [128, 128], "[0, 32] or"),
        ("int4", [0, 16], "[0, 32] or [0, 64] or [0, 128]"), ("int4", [1, 32], "[0, 32] or [0, 64] or [0, 128]"),
        ("mxfp4", [0, 64], "[0, 32]"), ("fp8", [], "[128, 128]"),
    ):
        yield (f"{name}-block-{'x'.join(map(str, shape)) or 'empty'}", "block_shape",
               quantised(name, block_shape=shape), ValueError, f"block_shape is {shape}", f"expected {expected}",
               f"for quantization='{FORMATS[name][0]}'")
    yield ("int4-no-block", "block_shape", quantised("int4", block_shape=None), ValueError, "block_shape is None",
           "quantization='int4_w4a16' needs groups", "pass [0, 32], [0, 64] or [0, 128]")

    # Scales of the activations.
    one = torch.ones(1)
    for name in ("int8_weights", "int4", "mxfp4"):
        for argument in ("a1_scale", "a2_scale"):
            yield (f"{name}-{argument}", argument, quantised(name, **{argument: one}), ValueError,
                   f"{argument} was given", f"quantization='{FORMATS[name][0]}' keeps 16-bit activations",
                   "leave it out")
    yield ("fp8_blocks-a2_scale", "a2_scale", quantised("fp8_blocks", a2_scale=one), ValueError,
           "a2_scale was given", "with block scales the op scales the activation itself", "leave it out")
    yield ("int8-a2_scale", "a2_scale", quantised("int8", a2_scale=one), ValueError,
           "a2_scale was given", "with quantization='int8_w8a8' the op scales", "leave it out")
    yield ("fp8_blocks-a1_scale", "a1_scale", quantised("fp8_blocks", a1_scale=one), ValueError,
           "a1_scale was given with 16-bit hidden_states", "groups of 128, which the op makes", "leave it out",
           "pass hidden_states in torch.float8_e4m3fn")
    yield ("int8-a1_scale", "a1_scale", quantised("int8", a1_scale=one), ValueError,
           "a1_scale was given with hidden_states in torch.float32", "quantises them by itself", "leave it out",
           "pass torch.int8")
    for label, scale, got, expected in (
        ("2", torch.ones(2), [2], "[1] or [E]"), ("2d", torch.ones(1, 1), [1, 1], "1 dimensions: [1] or [E]"),
        ("0d", torch.ones(()), [], "1 dimensions: [1] or [E]"),
    ):
        yield (f"fp8-a2_scale-{label}", "a2_scale", quantised("fp8", a2_scale=scale), ValueError,
               f"a2_scale has shape {got}", f"expected {expected}")
    for name, dtype, scale, got, expected in (
        ("fp8", torch.float32, torch.ones(tokens, 1), [tokens, 1], "[1]: [1]"),
        ("fp8", FP8, torch.ones(2), [2], "[1]: [1]"),
        ("fp8", FP8, torch.ones(tokens, 2), [tokens, 2], f"[{tokens}, 1]: [M, 1]"),
        ("fp8", FP8, torch.ones(1, 1, 1), [1, 1, 1], "2 dimensions: [M, 1]"),
        ("fp8_blocks", FP8, torch.ones(tokens, 2), [tokens, 2], f"[{tokens}, 1]: [M, H / 128]"),
        ("fp8_blocks", FP8, torch.ones(()), [], "2 dimensions: [M, H / 128]"),
        ("int8", INT8, torch.ones(1, 1), [1, 1], f"[{tokens}, 1]: [M, 1]"),
    ):
        yield (f"{name}-{dtype}-a1_scale-{'x'.join(map(str, got))}", "a1_scale",
               quantised(name, hidden_states=lambda x, d=dtype: x.to(d), a1_scale=scale), ValueError,
               f"a1_scale has shape {got}", f"expected {expected}")

    # Hidden states.
    for name, dtype in (("fp8", FP8), ("fp8_blocks", FP8), ("int8", INT8)):
        yield (f"{name}-hidden-without-scale", "a1_scale", quantised(name, hidden_states=lambda x, d=dtype: x.to(d)),
               ValueError, "a1_scale is None", f"hidden_states are quantised ({dtype})", "pass their scales")
    compute = "expected torch.bfloat16 or torch.float16 or torch.float32"
    for name, dtype, words in (
        ("fp8", torch.float64, (compute, "or torch.float8_e4m3fn with a1_scale")),
        ("fp8", torch.float8_e5m2, (compute, "or torch.float8_e4m3fn with a1_scale")),
        ("int8", FP8, (compute, "or torch.int8 with a1_scale")), ("int4", FP8, (compute,)),
        ("mxfp4", torch.uint8, (compute,)),
    ):
        yield (f"{name}-hidden-{dtype}", "hidden_states", quantised(name, hidden_states=lambda x, d=dtype: x.to(d)),
               TypeError, f"hidden_states has dtype {dtype}", *words, "cast it: hidden_states.to(torch.bfloat16)")
    for name in ("int4", "mxfp4"):
        yield (f"{name}-odd-hidden", "hidden_states", quantised(name, hidden_states=lambda x: x[:, 1:]), ValueError,
               f"H is {hidden - 1}, expected an even number", "two in a byte")
        yield (f"{name}-w1-unpacked", "w1", quantised(name, w1=lambda x: x.repeat(1, 1, 2)), ValueError,
               f"w1 has shape {[experts, rows, hidden]}", f"expected {[experts, rows, hidden // 2]}: [E, 2 * I, H / 2]")
        yield (f"{name}-w2-rows", "w2", quantised(name, w2=lambda x: x[:, 1:]), ValueError,
               f"w2 has shape {[experts, hidden - 1, intermediate // 2]}", "[E, H, I / 2]")
    # fmt: on
