"""Packed checkpoints: what AWQ and GPTQ store, packed here value by value, is what the op is given."""

import pytest
import torch

from moe_ops.quantization import dequantize, from_awq, from_gptq

K, N = 128, 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def pack_int32(values: list[int], bits: int) -> int:
    """Unsigned values, the first one lowest, as the int32 that has these bits."""
    word = sum(value << bits * i for i, value in enumerate(values))
    return word - 2**32 if word >= 2**31 else word


def pack_columns(matrix: torch.Tensor, bits: int, order=IN_ORDER) -> torch.Tensor:
    """[n, m] -> int32 [n, m * bits / 32]: value i of an int32 is that of column order[i]."""
    count = 32 // bits
    rows = [
        [pack_int32([row[c + order[i]] for i in range(count)], bits) for c in range(0, len(row), count)]
        for row in matrix.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def draw(group: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [K, N], zero points [K / g, N] from 1, scales [K / g, N], and the weights they stand for [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (K, N), generator=generator)
    zeros = torch.randint(1, 2**bits, (K // group, N), generator=generator)
    scales = torch.rand(K // group, N, generator=generator).half() + 0.5
    weight = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            weight[n, k] = (values[k, n] - zeros[k // group, n]) * scales[k // group, n].float()
    return values, zeros, scales, weight


def numbers(made, bits: int = 4) -> torch.Tensor:
    group = K // made.scale.shape[-1]
    name = "int4_w4a16" if bits == 4 else "int8_w8a16"
    return dequantize(made.weight, made.scale, name, block_shape=(0, group), zero_point=made.zero_point)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group):
    values, zeros, scales, weight = draw(group, 4)
    made = from_awq(pack_columns(values, 4, AWQ_ORDER), pack_columns(zeros, 4, AWQ_ORDER), scales)
    assert [list(part.shape) for part in made] == [[N, K // 2], [N, K // group], [N // 2, K // group]]
    assert made.scale.dtype == torch.float16 and all(part.is_contiguous() for part in made)
    assert torch.equal(numbers(made), weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq(bits, group, checkpoint_format):
    values, zeros, scales, weight = draw(group, bits)
    stored = zeros - 1 if checkpoint_format == "gptq" else zeros
    made = from_gptq(
        pack_columns(values.T, bits).T, pack_columns(stored, bits), scales, torch.arange(K) // group,
        checkpoint_format=checkpoint_format,
    )  # fmt: skip
    assert made.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert all(part.is_contiguous() for part in made)
    assert torch.equal(numbers(made, bits), weight)


def test_gptq_zero_point_0_is_stored_as_all_ones():
    values, zeros, scales, _ = draw(128, 4)
    made = from_gptq(pack_columns(values.T, 4).T, pack_columns(torch.full_like(zeros, 15), 4), scales)
    assert (made.zero_point == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_symmetric(bits):
    values, zeros, scales, _ = draw(32, bits)
    zeros[:] = 2 ** (bits - 1)
    packed = pack_columns(values.T, bits).T, pack_columns(zeros - 1, bits), scales
    made = from_gptq(*packed, symmetric=True)
    assert made.zero_point is None
    assert torch.equal(numbers(made, bits), numbers(from_gptq(*packed), bits))
    with pytest.raises(ValueError, match=f"expected {2 ** (bits - 1)} with symmetric=True; leave it out"):
        from_gptq(*packed, symmetric=True, checkpoint_format="gptq_v2")


def test_stacked_experts_and_joined_rows():
    drawn = [draw(32, 4, seed) for seed in range(4)]
    parts = [
        (pack_columns(v, 4, AWQ_ORDER), pack_columns(z, 4, AWQ_ORDER), s.half()) for v, z, s, _ in drawn
    ]  # gate and up of expert 0, gate and up of expert 1
    experts = [[torch.cat(pair, -1) for pair in zip(*parts[i : i + 2], strict=True)] for i in (0, 2)]
    made = from_awq(*(torch.stack(tensors) for tensors in zip(*experts, strict=True)))
    expected = torch.stack([torch.cat([drawn[i][3], drawn[i + 1][3]]) for i in (0, 2)])
    assert torch.equal(numbers(made), expected)


def test_groups_of_whole_columns_are_repeated():
    """group_size -1: one group of all K = 128 * n columns becomes n groups of 128."""
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-(2**31), 2**31, (48, N), generator=generator, dtype=torch.int64).int()
    qzeros = torch.randint(-(2**31), 2**31, (1, N // 8), generator=generator, dtype=torch.int64).int()
    scales = torch.rand(1, N, generator=generator)
    made = from_gptq(qweight, qzeros, scales)
    assert made.scale.shape == (N, 3) and made.zero_point.shape == (N // 2, 3)
    assert torch.equal(made.scale, scales.T.expand(N, 3))
    assert (made.zero_point == made.zero_point[:, :1]).all()


def gptq() -> dict[str, torch.Tensor]:
    values, zeros, scales, _ = draw(32, 4)
    return {"qweight": pack_columns(values.T, 4).T, "qzeros": pack_columns(zeros, 4), "scales": scales}


@pytest.mark.parametrize(
    ("convert", "changes", "error", "words"),
    [
        (from_gptq, {"qweight": lambda x: x.long()}, TypeError, "qweight has dtype torch.int64, expected torch.int32"),
        (from_gptq, {"qzeros": lambda x: x.float()}, TypeError, "qzeros has dtype torch.float32"),
        (from_gptq, {"qzeros": lambda x: x[:, :1]}, ValueError, r"expected 16 / 8 \(4 bits\) or 16 / 4 \(8 bits\)"),
        (from_gptq, {"qzeros": lambda x: x[1:]}, ValueError, "which has K = 128 and N = 16"),
        (from_gptq, {"scales": lambda x: x[1:]}, ValueError, "which has K = 128 and N = 16"),
        (from_gptq, {"qweight": lambda x: x[None]}, ValueError, "which has K = 128 and N = 16"),
        (from_gptq, {"qzeros": lambda x: x[:3], "scales": lambda x: x[:3]}, ValueError, "3 groups of K = 128 columns"),
        (from_gptq, {"qweight": lambda x: x[:8]}, ValueError, "quantise them anew with quantize_weights"),
        (from_awq, {}, ValueError, "which has K = 16 and N = 128"),
    ],
)  # fmt: skip
def test_refuses(convert, changes, error, words):
    tensors = gptq()
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(error, match=words):
        convert(**tensors)


def test_refuses_columns_in_another_order():
    order = torch.arange(K) // 32
    assert from_gptq(**gptq(), g_idx=order.int()).scale.shape == (N, 4)
    with pytest.raises(ValueError, match=r"g_idx is not k // 32: .* desc_act=False, or dequantise"):
        from_gptq(**gptq(), g_idx=order.flip(0))
    with pytest.raises(ValueError, match=r"g_idx has shape \[127\], expected \[..., K\] with K = 128"):
        from_gptq(**gptq(), g_idx=order[1:])
    with pytest.raises(ValueError, match="checkpoint_format is 'marlin', expected one of 'gptq', 'gptq_v2'"):
        from_gptq(**gptq(), checkpoint_format="marlin")
