"""From the packing of published checkpoints to the op's: AWQ and GPTQ. Exact, nothing is rounded.

Both store 4-bit values in int32, eight in each, as they multiply x @ W with W [K, N]; the op takes W^T, [N, K].
Nibble i is bits 4 i to 4 i + 3 of an int32::

    AWQ    qweight [K, N / 8]    nibble i of column c:  W[k, 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]]
           qzeros  [K / g, N / 8], in the same order;   scales [K / g, N]
    GPTQ   qweight [K / 8, N]    nibble i of row r:     W[8 r + i, n]
           qzeros  [K / g, N / 8]  nibble i of column c:  the zero point of 8 c + i, less 1;   scales [K / g, N]
    8-bit GPTQ: the same with bytes, four in an int32.
"""

import torch
from torch import Tensor

from moe_ops.checks import require_name
from moe_ops.quantization.dequantize import INT4_ZERO, INT8_ZERO, unpack
from moe_ops.quantization.quantize import QuantizedWeights, pack, pack_zero_points, per_matrix
from moe_ops.quantization.scheme import GROUP

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
# The nibble that holds column 0, 1, ... of eight.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_GROUPS = (32, 64, 128)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeights:
    """Weights of an AWQ checkpoint ("gemm" version, 4 bits) as int4_w4a16.

    Experts are stacked, and the rows of gate and up joined, before: `torch.cat([gate, up], -1)` for each of the three.
    The result's groups are `block_shape=(0, K // scale.shape[-1])`: the checkpoint's, or 128 where those are multiples
    of it.

    Args:
        qweight: int32 [..., K, N / 8].
        qzeros: int32 [..., K / g, N / 8].
        scales: [..., K / g, N], float16 as a rule; the dtype stays.

    Returns:
        uint8 weights [..., N, K / 2], scales [..., N, K / g], uint8 zero points [..., N / 2, K / g].

    Raises:
        TypeError: `qweight` or `qzeros` is not int32.
        ValueError: shapes that do not fit each other, or groups the op does not have.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import from_awq, unpack
        >>> qweight = torch.zeros(32, 1, dtype=torch.int32)
        >>> qweight[0] = 0x75316420  # of k = 0: columns 0 to 7 have the values 0 to 7
        >>> w, scale, zero = from_awq(qweight, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8).half())
        >>> w.shape, scale.shape, zero.shape
        (torch.Size([8, 16]), torch.Size([8, 1]), torch.Size([4, 1]))
        >>> unpack(w)[:, 0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]

    Source:
        The layout is that of WQLinear_GEMM in AutoAWQ (awq/modules/linear/gemm.py), MIT licence.
    """
    columns, rows = qweight.shape[-2:]
    _check(qweight, qzeros, scales, columns, 8 * rows)

    def convert(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeights:
        values, zeros = _awq_order(_nibbles(qweight)), _awq_order(_nibbles(qzeros))
        scales, zeros = _groups_of_128(scales.T, columns), _groups_of_128(zeros.T, columns)
        return QuantizedWeights(pack(values.T), scales, pack_zero_points(zeros))

    return per_matrix(convert, qweight, qzeros, scales)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    checkpoint_format: str = "gptq",
    symmetric: bool = False,
) -> QuantizedWeights:
    """Weights of a GPTQ checkpoint as int4_w4a16 (4 bits) or int8_w8a16 (8 bits).

    The bits are known from the shapes. Experts are stacked, and the rows of gate and up joined, before:
    `torch.cat([gate, up], -1)` for each of the first three. The result's groups are `block_shape=(0, K //
    scale.shape[-1])`: the checkpoint's, or 128 where those are multiples of it.

    Args:
        qweight: int32 [..., K / 8, N], or [..., K / 4, N] with 8 bits.
        qzeros: int32 [..., K / g, N / 8], or [..., K / g, N / 4] with 8 bits.
        scales: [..., K / g, N], float16 as a rule; the dtype stays.
        g_idx: int [..., K], the group of each column: k // g, since groups of the op are runs of columns. None: so.
        checkpoint_format: "gptq" stores zero points less 1, "gptq_v2" as they are: the name in quantize_config.json.
        symmetric: leave the zero points out; all of them are 8 (128 with 8 bits) where the checkpoint's `sym` is true.

    Returns:
        uint8 weights [..., N, K / 2] or int8 [..., N, K], scales [..., N, K / g], and uint8 zero points
        [..., N / 2, K / g] or [..., N, K / g].

    Raises:
        TypeError: `qweight` or `qzeros` is not int32.
        ValueError: shapes that do not fit each other, groups the op does not have, columns in the order of their
            activations (`desc_act`), or zero points that are not symmetric.

    Example:
        >>> import torch
        >>> from moe_ops.quantization import from_gptq, unpack
        >>> qweight = torch.zeros(4, 8, dtype=torch.int32)
        >>> qweight[0, 5] = 0x76543210  # row n = 5: columns 0 to 7 have the values 0 to 7
        >>> qzeros = torch.full((1, 1), 0x77777777, dtype=torch.int32)
        >>> w, scale, zero = from_gptq(qweight, qzeros, torch.ones(1, 8))
        >>> unpack(w)[5, :8].tolist(), unpack(zero).unique().tolist()
        ([0, 1, 2, 3, 4, 5, 6, 7], [8])

    Source:
        The layout is that of QuantLinear in AutoGPTQ (auto_gptq/nn_modules/qlinear), MIT licence; "gptq_v2" is
        GPTQModel's.
    """
    require_name("checkpoint_format", checkpoint_format, CHECKPOINT_FORMATS)
    rows = scales.shape[-1]
    bits = 32 * qzeros.shape[-1] // rows
    if bits not in (4, 8) or bits * rows != 32 * qzeros.shape[-1]:
        raise ValueError(
            f"qzeros has shape {list(qzeros.shape)} for {rows} columns of scales, expected {rows} / 8 (4 bits) or "
            f"{rows} / 4 (8 bits) columns; the op has no other widths"
        )
    columns = 32 // bits * qweight.shape[-2]
    _check(qweight, qzeros, scales, columns, qweight.shape[-1])
    if g_idx is not None:
        _check_order(g_idx, columns, scales.shape[-2])
    middle = INT4_ZERO if bits == 4 else INT8_ZERO

    def convert(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeights:
        values, zeros = (_nibbles if bits == 4 else _bytes)(qweight.T), (_nibbles if bits == 4 else _bytes)(qzeros)
        if checkpoint_format == "gptq":
            zeros = zeros + 1 & 2**bits - 1
        scales, zeros = _groups_of_128(scales.T, columns), _groups_of_128(zeros.T, columns)
        if symmetric and (zeros != middle).any():
            raise ValueError(
                f"qzeros stands for zero points from {zeros.min()} to {zeros.max()}, expected {middle} with "
                "symmetric=True; leave it out, or check checkpoint_format"
            )
        if bits == 4:
            return QuantizedWeights(pack(values), scales, None if symmetric else pack_zero_points(zeros))
        # Flipping the highest bit subtracts 128.
        return QuantizedWeights((values ^ INT8_ZERO).view(torch.int8), scales, None if symmetric else zeros)

    return per_matrix(convert, qweight, qzeros, scales)


def _check(qweight: Tensor, qzeros: Tensor, scales: Tensor, columns: int, rows: int) -> None:
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.int32, as it is in the checkpoint")
    groups = scales.shape[-2]
    leading = qweight.shape[:-2]
    if scales.shape != (*leading, groups, rows) or qzeros.shape[:-1] != (*leading, groups):
        raise ValueError(
            f"scales has shape {list(scales.shape)} and qzeros {list(qzeros.shape)}, expected [..., K / g, N] and "
            f"[..., K / g, N / ...] for qweight {list(qweight.shape)}, which has K = {columns} and N = {rows}"
        )
    size = columns // groups
    if columns % groups or (size not in _GROUPS and size % GROUP):
        raise ValueError(
            f"scales has {groups} groups of K = {columns} columns, expected groups of 32, 64 or a multiple of 128; "
            "dequantise the weights, and quantise them anew with quantize_weights"
        )


def _check_order(g_idx: Tensor, columns: int, groups: int) -> None:
    runs = torch.arange(columns, device=g_idx.device) // (columns // groups)
    if g_idx.shape[-1] != columns:
        raise ValueError(f"g_idx has shape {list(g_idx.shape)}, expected [..., K] with K = {columns}")
    if (g_idx != runs).any():
        raise ValueError(
            f"g_idx is not k // {columns // groups}: columns were quantised in the order of their activations "
            "(desc_act), and the op's groups are runs of columns; take a checkpoint made with desc_act=False, or "
            "dequantise the weights and quantise them anew with quantize_weights"
        )


def _bytes(packed: Tensor) -> Tensor:
    """int32 [n, m] -> its bytes, uint8 [n, 4 m], the lowest first."""
    return packed.contiguous().view(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [n, m] -> its nibbles, uint8 [n, 8 m], the lowest first."""
    return unpack(_bytes(packed))


def _awq_order(nibbles: Tensor) -> Tensor:
    """Nibbles [n, m] in the order of the columns."""
    return nibbles.unflatten(-1, (-1, 8))[..., _AWQ_NIBBLES].flatten(-2)


def _groups_of_128(groups: Tensor, columns: int) -> Tensor:
    """Scales or zero points [N, K / g], those of larger groups repeated."""
    size = columns // groups.shape[-1]
    return groups.repeat_interleave(size // GROUP, -1) if size > GROUP else groups.contiguous()
