"""The formats: what stored values stand for, written out by hand, and rounding to them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops.quantization import (
    dequantize,
    dequantize_activations,
    pack,
    quantize_activations,
    quantize_weights,
    unpack,
)

NAN, INF = float("nan"), float("inf")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = torch.finfo(torch.float32).tiny
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def uint8(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


# What stored values stand for.


@pytest.mark.parametrize("quantization,dtype", [("fp8_w8a8", E4M3), ("fp8_w8a8", E5M2), ("int8_w8a8", torch.int8)])
def test_a_scale_per_row(quantization, dtype):
    weight = torch.tensor([[1.0, -2.0, 64.0], [3.0, 0.0, -1.0]]).to(dtype)
    scale = torch.tensor([0.5, 4.0])
    assert dequantize(weight, scale, quantization).tolist() == [[0.5, -1.0, 32.0], [12.0, 0.0, -4.0]]
    assert dequantize(weight[None], scale[None], quantization).tolist() == [[[0.5, -1.0, 32.0], [12.0, 0.0, -4.0]]]


def test_a_scale_per_tensor():
    weight = torch.tensor([[[1.0, 448.0]], [[-0.125, 2.0]]]).to(E4M3)
    assert dequantize(weight, torch.tensor([2.0, 0.5]), "fp8_w8a8").tolist() == [[[2.0, 896.0]], [[-0.0625, 1.0]]]
    assert dequantize(weight[1], torch.tensor(0.5), "fp8_w8a8").tolist() == [[-0.0625, 1.0]]


@pytest.mark.parametrize("quantization,dtype", [("fp8_w8a8", E4M3), ("int8_w8a8", torch.int8)])
def test_blocks_are_counted_over_stacked_rows(quantization, dtype):
    """I = 72: the second block of rows begins inside up, at row 128 of 144, and not with it, at row 72."""
    rows, columns = 144, 130
    scale = torch.arange(1.0, 9.0).view(2, 2, 2)
    got = dequantize(torch.ones(2, rows, columns).to(dtype), scale, quantization, block_shape=(128, 128))
    for e, n, k in itertools.product(range(2), (0, 71, 72, 127, 128, 143), (0, 127, 128, 129)):
        assert got[e, n, k] == scale[e, n // 128, k // 128], (e, n, k)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_along_k(group):
    columns = group + 6
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    got = dequantize(torch.full((2, columns), -3, dtype=torch.int8), scale, "int8_w8a16", block_shape=(0, group))
    assert got.tolist() == [[-3.0 * s[0]] * group + [-3.0 * s[1]] * 6 for s in scale.tolist()]
    packed = torch.full((2, columns // 2), 0x99, dtype=torch.uint8)
    got = dequantize(packed, scale, "int4_w4a16", block_shape=(0, group))
    assert got.tolist() == [[s[0]] * group + [s[1]] * 6 for s in scale.tolist()]


def test_int8_without_groups():
    weight = torch.tensor([[-128, 127, 0]], dtype=torch.int8)
    assert dequantize(weight, torch.tensor([0.5]), "int8_w8a16").tolist() == [[-64.0, 63.5, 0.0]]


def test_int8_zero_points():
    """Stored q is the unsigned value less 128."""
    weight = torch.tensor([[-128, -127, 127], [-128, 0, 5]], dtype=torch.int8)
    got = dequantize(weight, torch.ones(2, 1), "int8_w8a16", block_shape=(0, 32), zero_point=uint8([[0], [255]]))
    assert got.tolist() == [[0.0, 1.0, 255.0], [-255.0, -127.0, -122.0]]


@pytest.mark.parametrize("k", range(8))
def test_every_nibble(k):
    packed = torch.zeros(1, 4, dtype=torch.uint8)
    packed[0, k // 2] = 0xF if k % 2 == 0 else 0xF0
    assert unpack(packed)[0].tolist() == [15 * (k == i) for i in range(8)]
    got = dequantize(packed, torch.ones(1, 1), "int4_w4a16", block_shape=(0, 32))
    assert got[0].tolist() == [7.0 if k == i else -8.0 for i in range(8)]
    assert dequantize(packed, uint8([[127]]), "mxfp4_w4a16")[0].tolist() == [-6.0 * (k == i) for i in range(8)]


def test_zero_points_are_packed_along_n():
    """N = 3: the last byte has one zero point, and a nibble that nothing reads."""
    zero_point = uint8([[0x21, 0x43], [0xF5, 0xF6]])  # rows 0 to 2 of group 0: 1, 2, 5; of group 1: 3, 4, 6
    weight = torch.full((3, 20), 0x88, dtype=torch.uint8)
    got = dequantize(weight, torch.ones(3, 2), "int4_w4a16", block_shape=(0, 32), zero_point=zero_point)
    assert got.tolist() == [[7.0] * 32 + [5.0] * 8, [6.0] * 32 + [4.0] * 8, [3.0] * 32 + [2.0] * 8]


def test_every_e2m1_code():
    packed = uint8([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]])
    got = dequantize(packed, uint8([[128]]), "mxfp4_w4a16")[0]
    assert got.tolist() == [2 * x for x in E2M1] + [-2 * x for x in E2M1]
    assert got.signbit().tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [torch.uint8, torch.float8_e8m0fnu])
def test_every_e8m0_scale(dtype, scales):
    scale = torch.arange(256).to(torch.uint8).view(scales)[:, None]
    got = dequantize(torch.full((256, 1), 0x22, dtype=torch.uint8), scale, "mxfp4_w4a16", dtype=dtype)
    assert got[:255, 0].tolist() == [2.0 ** (s - 127) for s in range(255)]
    assert got[255].isnan().all()


def test_mxfp4_blocks_of_16_bytes():
    packed = torch.randint(256, (2, 3, 64), dtype=torch.uint8)
    scale = torch.randint(120, 130, (2, 3, 4), dtype=torch.uint8)
    expected = dequantize(packed, scale, "mxfp4_w4a16")
    assert torch.equal(dequantize(packed.view(2, 3, 4, 16), scale, "mxfp4_w4a16"), expected)
    assert torch.equal(dequantize(packed[1].view(3, 4, 16), scale[1], "mxfp4_w4a16"), expected[1])
    apart = packed.view(2, 3, 4, 16).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(dequantize(apart, scale, "mxfp4_w4a16"), expected)


def test_arithmetic_is_in_the_dtype_asked_for():
    weight = torch.tensor([[3]], dtype=torch.int8)
    got = dequantize(weight, torch.tensor([1 / 3]), "int8_w8a8", dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.item() == (torch.tensor(1 / 3).bfloat16() * 3).item()


def test_dequantize_refuses():
    weight = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="quantization is 'none'"):
        dequantize(weight, torch.ones(2), "none")
    with pytest.raises(ValueError, match=r"scale has shape \[2, 1\], a scale per block, and block_shape is None"):
        dequantize(weight, torch.ones(2, 1), "int8_w8a16")


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_pack_is_the_inverse_of_unpack(values):
    packed = pack(torch.tensor(values))
    assert packed.shape == (math.ceil(len(values) / 2),)
    assert unpack(packed).tolist()[: len(values)] == values
    assert torch.equal(pack(unpack(packed)), packed)


# Rounding weights.

OPTIONS = [
    ("fp8_w8a8", {"granularity": "tensor"}),
    ("fp8_w8a8", {"granularity": "channel"}),
    ("fp8_w8a8", {"dtype": E5M2}),
    ("fp8_w8a8", {"block_shape": (128, 128)}),
    ("int8_w8a8", {}),
    ("int8_w8a8", {"block_shape": [128, 128]}),
    ("int8_w8a16", {}),
    ("int8_w8a16", {"block_shape": (0, 32)}),
    ("int8_w8a16", {"block_shape": (0, 64), "zero_points": True}),
    ("int4_w4a16", {"block_shape": (0, 128)}),
    ("int4_w4a16", {"block_shape": (0, 32), "zero_points": True}),
    ("mxfp4_w4a16", {}),
]


def numbers(made, quantization, options) -> torch.Tensor:
    return dequantize(
        made.weight, made.scale, quantization, block_shape=options.get("block_shape"), zero_point=made.zero_point,
        dtype=torch.float64,
    )  # fmt: skip


def largest_error(weight, quantization, options) -> torch.Tensor:
    """Half a step, for every weight, from a matrix [N, K]: the definition, in float64, block by block."""
    weight = weight.double()
    rows, columns = options.get("block_shape") or ((0, 32) if quantization == "mxfp4_w4a16" else (0, weight.shape[1]))
    rows = weight.shape[0] if options.get("granularity") == "tensor" else max(1, rows)
    half = torch.empty_like(weight)
    for block, out in zip(_blocks(weight, rows, columns), _blocks(half, rows, columns), strict=True):
        largest = block.abs().max()
        if quantization == "mxfp4_w4a16":
            power = 2.0 ** (math.floor(math.log2(largest)) - 2)
            size = block.abs() / power
            steps = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
            out[:] = torch.where(size > 7, 2.0, steps / 2) * power  # above 7 it saturates
        elif quantization == "fp8_w8a8":
            info = torch.finfo(options.get("dtype", E4M3))
            unit = max(largest / info.max, TINY)
            power = torch.exp2((block.abs() / unit).clamp(min=info.tiny).log2().floor())
            out[:] = power * info.eps / 2 * unit
        else:
            bits = 4 if quantization == "int4_w4a16" else 8
            if options.get("zero_points"):
                span = (block.max().clamp(min=0) - block.min().clamp(max=0)) / (2**bits - 1)
            else:
                span = largest / (7.5 if bits == 4 else 127)
            out[:] = max(span, TINY) / 2
    return half


def _blocks(matrix, rows, columns):
    return [block for part in matrix.split(rows, 0) for block in part.split(columns, 1)]


@pytest.mark.parametrize("quantization,options", OPTIONS, ids=str)
@settings(deadline=None, max_examples=15)
@given(
    experts=st.integers(1, 2), rows=st.integers(1, 140), half=st.integers(1, 100), seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), shift=st.sampled_from([0.0, 0.0, 3.0, -3.0]),
)  # fmt: skip
def test_half_a_step(quantization, options, experts, rows, half, seed, size, shift):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(experts, rows, 2 * half, generator=generator) + shift) * size
    made = quantize_weights(weight, quantization, **options)
    error = (numbers(made, quantization, options) - weight.double()).abs()
    for expert in range(experts):
        # The last part is float32's own error, in the scale and in what is rounded.
        allowed = largest_error(weight[expert], quantization, options) + 4e-7 * weight[expert].abs().max()
        assert (error[expert] <= allowed).all()
    assert made.weight.is_contiguous() and made.scale.is_contiguous()
    if quantization != "mxfp4_w4a16":
        assert made.scale.dtype == torch.float32


@pytest.mark.parametrize("quantization,options", OPTIONS, ids=str)
def test_values_that_are_hard_to_scale(quantization, options):
    """Zeros stay zeros; what is tiny, huge or infinite stays finite; a NaN shows, in its block and nowhere else."""
    torch.manual_seed(0)
    weight = torch.randn(5, 128, 256)
    weight[0] = 0
    weight[1] *= 1e-38
    weight[2] = 3.4e38 * weight[2].clamp(-1, 1)
    weight[3, 0, 0], weight[4, 0, 0] = NAN, -INF
    weight[3, 0, 1] = -0.0
    made = quantize_weights(weight, quantization, **options)
    got = numbers(made, quantization, options)
    assert (got[0] == 0).all()
    assert got[[1, 2, 4]].isfinite().all()
    assert (got[1] - weight[1]).abs().max() <= 2e-38 and got[2].abs().max() > 2e38
    assert got[4, 0, 0] < -2e38
    assert got[3, 0, :32].isnan().all()
    per_tensor = options.get("granularity") == "tensor" or 128 in options.get("block_shape", ())[:1]
    assert got[3, 1:, 128:].isfinite().all() or per_tensor
    for expert in range(5):
        alone = quantize_weights(weight[expert], quantization, **options)
        for one, together in zip(alone, made, strict=True):
            if one is not None:
                torch.testing.assert_close(one.float(), together[expert].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_ties_go_to_even_mantissas(sign):
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    above, below = ([tie * (1 + part) for tie in ties] for part in (1e-6, -1e-6))
    values = torch.tensor([*ties, *above, *below, 6.0, 7.0, 7.99])
    made = quantize_weights(sign * values[None], "mxfp4_w4a16")
    assert made.scale.tolist() == [[127]]
    got = dequantize(made.weight, made.scale, "mxfp4_w4a16")[0].abs().tolist()
    assert got == [*expected, *E2M1[1:], *E2M1[:-1], 6.0, 6.0, 6.0]


def test_integer_ties_go_to_even():
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])
    made = quantize_weights(values, "int8_w8a8")
    assert made.weight.tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]] and made.scale.tolist() == [1.0]
    values = torch.tensor([[7.5, 0.5, 1.5, -7.5, -2.5, 6.5, 7.0, -7.25]])
    made = quantize_weights(values, "int4_w4a16", block_shape=(0, 32))
    assert (unpack(made.weight).int() - 8).tolist() == [[7, 0, 2, -8, -2, 6, 7, -7]]


def test_zero_points_keep_zero_in_range():
    """Weights far from 0 on one side: the zero point is an end of the range, and 0 stays 0 exactly."""
    weight = torch.tensor([[5.0, 6.0, 0.0, 7.5], [-5.0, -6.0, 0.0, -7.5]])
    made = quantize_weights(weight, "int4_w4a16", block_shape=(0, 32), zero_points=True)
    assert made.zero_point.tolist() == [[0xF0]] and made.scale.tolist() == [[0.5], [0.5]]
    assert unpack(made.weight).tolist() == [[10, 12, 0, 15], [5, 3, 15, 0]]


def test_strides_and_leading_dimensions():
    weight = torch.randn(2, 3, 40, 64)
    made = quantize_weights(weight, "int4_w4a16", block_shape=(0, 32), zero_points=True)
    assert [list(part.shape) for part in made] == [[2, 3, 40, 32], [2, 3, 40, 2], [2, 3, 20, 2]]
    n_major = weight.transpose(2, 3).contiguous().transpose(2, 3)
    for one, other in zip(
        made, quantize_weights(n_major, "int4_w4a16", block_shape=(0, 32), zero_points=True), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("weight", "quantization", "options", "error", "words"),
    [
        (torch.ones(2, 4), "fp4", {}, ValueError, "quantization is 'fp4', expected one of 'fp8_w8a8'"),
        (torch.ones(2, 4), "none", {}, ValueError, "quantization is 'none'"),
        (torch.ones(2, 4).int(), "int8_w8a8", {}, TypeError, "weight has dtype torch.int32"),
        (torch.ones(4), "int8_w8a8", {}, ValueError, r"weight has shape \[4\], expected \[..., N, K\]"),
        (torch.ones(0, 2, 4), "int8_w8a8", {}, ValueError, "at least one element"),
        (torch.ones(2, 5), "mxfp4_w4a16", {}, ValueError, "K = 5 columns, expected an even number"),
        (torch.ones(2, 5), "int4_w4a16", {"block_shape": (0, 32)}, ValueError, "K = 5 columns"),
        (torch.ones(2, 4), "int4_w4a16", {}, ValueError, "block_shape is None"),
        (torch.ones(2, 4), "int4_w4a16", {"block_shape": (0, 16)}, ValueError, r"block_shape is \[0, 16\]"),
        (torch.ones(2, 4), "fp8_w8a8", {"block_shape": (0, 32)}, ValueError, r"expected \[128, 128\]"),
        (torch.ones(2, 4), "fp8_w8a8", {"dtype": torch.int8}, TypeError, "expected torch.float8_e4m3fn or"),
        (torch.ones(2, 4), "fp8_w8a8", {"granularity": "row"}, ValueError, "expected one of 'tensor', 'channel'"),
        (torch.ones(2, 4), "int8_w8a8", {"granularity": "tensor"}, ValueError, "pass 'channel'"),
        (torch.ones(2, 4), "mxfp4_w4a16", {"granularity": "channel"}, ValueError, "those of blocks; leave it out"),
        (torch.ones(2, 4), "int8_w8a16", {"zero_points": True}, ValueError, "zero_points is True"),
        (torch.ones(2, 4), "fp8_w8a8", {"zero_points": True}, ValueError, "zero_points is True"),
    ],
)  # fmt: skip
def test_quantize_refuses(weight, quantization, options, error, words):
    with pytest.raises(error, match=words):
        quantize_weights(weight, quantization, **options)


# Rounding activations.


@pytest.mark.parametrize("dtype,most", [(E4M3, 448.0), (torch.int8, 127.0)])
@pytest.mark.parametrize("granularity", ["token", "group"])
def test_rows_that_are_hard_to_scale(dtype, most, granularity):
    x = torch.zeros(7, 200)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3], x[5, 3] = 1e-38, -1e5, NAN, INF, -INF
    x[6, :2] = torch.tensor([-0.0, 1.0])
    q, scale = quantize_activations(x, dtype, granularity)
    assert q.dtype == dtype and scale.dtype == torch.float32
    assert list(scale.shape) == ([7, 1] if granularity == "token" else [7, 2])
    q, first = q.float(), scale[:, 0]
    assert (q[0] == 0).all() and first[0] == TINY
    # Less than the scale's own limit: a value of the order of 1.
    assert q[1, 3] == (torch.tensor(1e-38) / TINY).to(E4M3).float() if dtype == E4M3 else q[1, 3] == 1
    assert q[2, 3] == -most and first[2] == torch.tensor(1e5) / most
    assert first[3].isnan() and dequantize_activations(q, scale)[3, :128].isnan().all()
    assert q[4, 3] == most and q[5, 3] == -most and first[4:6].isfinite().all()
    assert q[6, 1] == most and q[6, 0] == 0
    assert q[6, 0].signbit() == (dtype == E4M3)
    assert (q[:, 128:] == 0).all() or granularity == "token"
    if granularity == "group":
        assert (scale[:, 1] == TINY).all()  # the NaN does not reach the other group


def test_activations_to_the_nearest_ties_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_activations(x, torch.int8, "token")[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    x = torch.tensor([[448.0, 17.0, 19.0, 18.0, -17.0, 2**-10, 3 * 2**-10, 2**-10 * 1.001]])
    assert quantize_activations(x, E4M3, "token")[0].tolist() == [[448, 16, 20, 18, -16, 0, 2**-8, 2**-9]]


@pytest.mark.parametrize("dtype,most", [(E4M3, 448.0), (torch.int8, 127.0)])
def test_a_given_scale_saturates(dtype, most):
    x = torch.tensor([[0.0, 1.0, 1e5, -1e5, INF, -INF, 2 * most + 1]])
    q, scale = quantize_activations(x, dtype, "tensor", torch.tensor([2.0]))
    assert scale.tolist() == [2.0]
    assert q.float().tolist() == [[0.0, 0.5 if dtype == E4M3 else 0.0, most, -most, most, -most, most]]
    q, _ = quantize_activations(torch.tensor([[NAN]]), E4M3, "tensor", torch.tensor([2.0]))
    assert q.float().isnan().all()


@pytest.mark.parametrize("dtype,most", [(E4M3, 448.0), (torch.int8, 127.0)])
@pytest.mark.parametrize("scale", [0.0, 1e-40, TINY])
def test_a_given_scale_that_is_too_small(dtype, most, scale):
    """Zeros stay zeros; the rest saturates, as by the smallest normal number."""
    x = torch.tensor([[0.0, -0.0, 1e-30, -1.0, INF]])
    q, given = quantize_activations(x, dtype, "tensor", torch.tensor([scale]))
    assert q.tolist() == [[0, 0, most, -most, most]]
    assert given.tolist() == torch.tensor([scale]).tolist()
    assert quantize_activations(x, E4M3, "tensor", torch.tensor([NAN]))[0].float().isnan().all()
    assert quantize_activations(x, dtype, "tensor", torch.tensor([-0.25]))[0].tolist() == [[0, 0, 0, 4, -most]]


def test_groups_of_activations():
    x = torch.ones(2, 300) * torch.tensor([[1.0], [2.0]])
    x[:, 128:256] *= 4
    x[:, 256:] *= 16
    q, scale = quantize_activations(x, torch.int8, "group")
    assert (q == 127).all()
    torch.testing.assert_close(scale * 127, torch.tensor([[1.0, 4.0, 16.0], [2.0, 8.0, 32.0]]))
    torch.testing.assert_close(dequantize_activations(q, scale), x)
    again, same = quantize_activations(x, torch.int8, "group", scale)
    assert torch.equal(again, q) and same is scale


def test_activations_refuse_a_tensor_without_its_scale():
    with pytest.raises(ValueError, match="granularity is 'tensor' without a scale"):
        quantize_activations(torch.ones(1, 1), E4M3, "tensor")


@settings(deadline=None)
@given(
    dtype=st.sampled_from([E4M3, torch.int8]), granularity=st.sampled_from(["token", "group"]),
    columns=st.integers(1, 300), size=st.sampled_from([1e-30, 1.0, 1e30]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_activations_are_within_half_a_step(dtype, granularity, columns, size, seed):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantize_activations(x, dtype, granularity)
    options = {} if granularity == "token" else {"block_shape": (1, 128)}
    half = largest_error(x, "fp8_w8a8" if dtype == E4M3 else "int8_w8a8", options)
    error = (dequantize_activations(q, scale, torch.float64) - x.double()).abs()
    assert (error <= half + 4e-7 * x.abs().amax(1, keepdim=True)).all()
