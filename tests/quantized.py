"""Quantised calls that every path must get right; shared by the interpreter, the compile and the GPU tests."""

import torch

from moe_ops.arguments import Arguments
from moe_ops.testing import override, poisoned_memory, quantized_inputs
from tests.cases import OPTIONS, SMALL, run

_BLOCKS = {"block_shape": (128, 128)}
FORMATS = {
    "fp8_tensor": {"quantization": "fp8_w8a8", "granularity": "tensor"},
    "fp8_channel": {"quantization": "fp8_w8a8", "granularity": "channel"},
    "fp8_e5m2": {"quantization": "fp8_w8a8", "granularity": "channel", "weight_dtype": torch.float8_e5m2},
    "fp8_static": {"quantization": "fp8_w8a8", "granularity": "tensor", "static": True},
    "fp8_static_expert": {"quantization": "fp8_w8a8", "granularity": "channel", "static": "expert"},
    "fp8_given": {"quantization": "fp8_w8a8", "granularity": "channel", "inputs_given": True},
    "fp8_given_tensor": {"quantization": "fp8_w8a8", "granularity": "tensor", "inputs_given": "tensor"},
    "fp8_block": {"quantization": "fp8_w8a8", **_BLOCKS},
    "fp8_block_given": {"quantization": "fp8_w8a8", "inputs_given": True, **_BLOCKS},
    "int8_channel": {"quantization": "int8_w8a8", "granularity": "channel"},
    "int8_block": {"quantization": "int8_w8a8", **_BLOCKS},
    "int8_weights": {"quantization": "int8_w8a16", "granularity": "channel"},
    "int8_weights_groups": {"quantization": "int8_w8a16", "block_shape": (0, 64)},
    "int8_weights_zero_points": {"quantization": "int8_w8a16", "block_shape": (0, 32), "zero_points": True},
    "int4": {"quantization": "int4_w4a16", "block_shape": (0, 128)},
    "int4_zero_points": {"quantization": "int4_w4a16", "block_shape": (0, 32), "zero_points": True},
    "mxfp4": {"quantization": "mxfp4_w4a16"},
}
# K has a short last block and a short last group, 2 I a block that lies in gate and in up; TMA can step over rows.
SIZES = {**SMALL, "num_tokens": 9, "hidden": 160, "intermediate": 96}
_OPTIONS = [name for name in OPTIONS if "n_major" not in name and "tails" not in name]


def quantized_case(name: str, dtype: torch.dtype, device: str = "cpu", **options) -> Arguments:
    """The call of that format; `options` stand in for those of SIZES."""
    return quantized_inputs(dtype=dtype, device=device, **{**SIZES, **FORMATS[name], **options})


def with_options() -> list[tuple[str, str]]:
    """(format, option) pairs: every option of the op with some format, every format with some options."""
    formats = list(FORMATS)
    return [(formats[(5 * i) % len(formats)], option) for i, option in enumerate(_OPTIONS)]


def one_hot_case(quantization: str, dtype: torch.dtype, device: str = "cpu", num_tokens: int = 64) -> Arguments:
    """Every code of a format of 4 bits in every place: out[k, n] = relu(code of w1[n, k])^2, exactly.

    Token k, of at most 64, is one-hot in column k, w2 is the identity, and all scales are 1.
    """
    size, experts = 64, 2
    codes = (torch.arange(size)[:, None] + 3 * torch.arange(size)[None, :]) % 16
    w1 = torch.stack([codes, codes.flip(1)])
    if quantization == "int4_w4a16":
        one, zero, scale = 9, 8, torch.ones(experts, size, size // 32)
    else:
        one, zero, scale = 2, 0, torch.full((experts, size, size // 32), 127, dtype=torch.uint8)
    w2 = torch.where(torch.eye(size) > 0, one, zero).expand(experts, -1, -1)
    tensors = [torch.eye(size, dtype=dtype)[:num_tokens], *(_pack(codes) for codes in (w1, w2))]
    tensors += [torch.ones(num_tokens, 1), torch.arange(num_tokens)[:, None] % experts]
    scale = scale.to(device)
    return Arguments(
        *(tensor.to(device) for tensor in tensors), w1_scale=scale, w2_scale=scale, activation="relu2_no_gate",
        quantization=quantization, block_shape=(0, 32),
    )  # fmt: skip


def fine_scales_case(device: str = "cpu", num_tokens: int = 64) -> Arguments:
    """`one_hot_case` of int4 whose scales of w1 have 12 bits: bfloat16 holds neither them nor most of the weights."""
    args = one_hot_case("int4_w4a16", torch.bfloat16, device, num_tokens)
    scale = 1 + torch.arange(args.w1_scale.numel(), device=device) * 13 % 1024 * 2.0**-11
    args.w1_scale = scale.reshape(args.w1_scale.shape)
    return args


def every_scale_case(device: str = "cpu", num_tokens: int = 64) -> tuple[Arguments, torch.Tensor]:
    """e8m0 scales of every size with every code of e2m1, and what comes out: out[k, n] = w2[n, k], row n by scale n.

    Token k, of at most 64, is one-hot in column k, and w1 leaves it so. Of the last three scales the first two are left
    out, which times 6 bfloat16 does not hold; the last one is NaN.
    """
    size, experts, rows = 64, 2, 256
    e = torch.arange(rows)
    e[-3:-1] = 252
    codes = (torch.arange(rows)[:, None] + 3 * torch.arange(size)[None, :]) % 16
    codes[-1] %= 2  # no code that a large number in the place of NaN would make infinite
    w2 = torch.stack([codes, codes.flip(1)])
    w1 = torch.where(torch.eye(size, rows) > 0, 2, 0).expand(experts, -1, -1)
    ids = torch.arange(num_tokens)[:, None] % experts
    x = torch.eye(size, rows, dtype=torch.bfloat16)[:num_tokens]
    tensors = [x, _pack(w1), _pack(w2), torch.ones(num_tokens, 1), ids]
    one, scale = torch.full((experts, size, rows // 32), 127), e[None, :, None].expand(experts, -1, 2)
    args = Arguments(
        *(tensor.to(device) for tensor in tensors), w1_scale=one.to(device, torch.uint8),
        w2_scale=scale.to(device, torch.uint8).contiguous(), activation="relu2_no_gate",
        quantization="mxfp4_w4a16",
    )  # fmt: skip
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    numbers = torch.cat([magnitudes, -magnitudes])[w2] * torch.where(e == 255, torch.nan, 2.0 ** (e - 127.0))[:, None]
    return args, torch.stack([numbers[k % experts, :, k] for k in range(num_tokens)]).to(device)


def check_every_scale(args: Arguments, expected: torch.Tensor, variant: str) -> None:
    """`every_scale_case` on the TMA path: exact, but for numbers below the normal ones."""
    with override(path="tma", variant=variant), poisoned_memory():
        out = run(args)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2.0**-126, equal_nan=True)


def negative_scales_case(device: str = "cpu") -> Arguments:
    """Scales below 0 given for the rows: what is divided by them is multiplied by them again."""
    args = quantized_case("fp8_static", torch.bfloat16, device, num_tokens=8)
    args.a1_scale, args.a2_scale = -args.a1_scale, -args.a2_scale
    return args


def scales_of_zero_case(device: str = "cpu") -> Arguments:
    """Scales of 0 given for the rows, as calibration leaves them where it met zeros alone: the result is zeros."""
    args = quantized_case("fp8_static", torch.bfloat16, device, num_tokens=8)
    args.hidden_states[0] = 0
    args.a1_scale, args.a2_scale = torch.zeros_like(args.a1_scale), torch.zeros_like(args.a2_scale)
    return args


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def hard_rows(dtype: torch.dtype, columns: int, device: str = "cpu") -> torch.Tensor:
    """Rows that scales have trouble with: zeros, tiny, huge, NaN, infinite, one large column; then an ordinary one."""
    rows = torch.randn(8, columns, generator=torch.Generator().manual_seed(0))
    largest = torch.finfo(dtype).max
    rows[0] = 0
    rows[1] = rows[1].sign() * 1e-38
    rows[2] = (rows[2] * 1e5).clamp(-largest, largest)
    rows[3, columns // 2] = float("nan")
    rows[4, 1] = float("inf")
    rows[5, 0] = -largest
    rows[6, -1] = 3e4
    return rows.to(device, dtype)
