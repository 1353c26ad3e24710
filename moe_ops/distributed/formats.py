"""In which dtypes hidden states and partial sums travel, and what that leaves of the op's roundings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops.checks import require_name
from moe_ops.exchange import RowLayout, scales_of

PAYLOADS = ("auto", "plain", "quantized")
_ROW_DTYPES = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8}
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Formats:
    """How a call's numbers travel.

    Attributes:
        layout: of a row on the way out.
        partial_dtype: of a partial sum as the op writes it.
        combine_dtype: of a partial sum on the way back; float16 rows of a float32 one have a scale each. None: float32,
            or float16 where that is faster.
        out_dtype: of the result.
        quantized: the rows arrive quantised, with scales.
        given: they are quantised before the call.
    """

    layout: RowLayout
    partial_dtype: torch.dtype
    combine_dtype: torch.dtype | None
    out_dtype: torch.dtype
    quantized: bool
    given: bool


def make_formats(
    hidden_states: Tensor,
    top_k: int,
    *,
    payload: str,
    combine_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    quantization: str,
    block_shape: Sequence[int] | None,
    static_scale: bool,
) -> Formats:
    """Chooses the dtypes of a call.

    Hidden states travel quantised where the op would quantise them anyway, row by row: the sender does it by the same
    formula, so nothing more is rounded.

    Args:
        hidden_states: [M, H].
        top_k: slots of a token.
        payload: "auto", "plain" or "quantized".
        combine_dtype: of the partial sums, or None.
        out_dtype: as `moe_ops.fused_moe`.
        quantization: as `moe_ops.fused_moe`.
        block_shape: as `moe_ops.fused_moe`.
        static_scale: with an `a1_scale`.

    Returns:
        The formats.

    Raises:
        ValueError: `payload` or the dtypes cannot be had with this format.
    """
    require_name("payload", payload, PAYLOADS)
    x_dtype, row_dtype = hidden_states.dtype, _ROW_DTYPES.get(quantization)
    given = x_dtype not in (torch.bfloat16, torch.float16, torch.float32)
    compute = x_dtype
    if given:
        compute = out_dtype if out_dtype in _HALVES else torch.bfloat16
    # float16 is that of the op's own result where it computes in that, and made of float32 elsewhere.
    own = combine_dtype == torch.bfloat16 or combine_dtype == compute
    back = combine_dtype if combine_dtype and own else torch.float32
    if combine_dtype is None and compute != torch.bfloat16:
        # float16 would be a rounding as large as those of the experts, or larger.
        combine_dtype = torch.float32
    # Of quantised rows the op knows its compute dtype by that of its result alone.
    known = compute == torch.bfloat16 if back == torch.float32 else compute == back
    can = row_dtype is not None and known and not (static_scale and not given)
    if given and not known:
        raise ValueError(
            f"combine_dtype is {back}, and with quantised hidden_states the experts compute in {compute}; pass "
            f"combine_dtype={compute}"
        )
    if given and payload == "plain":
        raise ValueError("payload is 'plain', but hidden_states arrive quantised and travel so; pass payload='auto'")
    if payload == "quantized" and not given and not can:
        raise ValueError(
            f"payload is 'quantized', but {_obstacle(quantization, row_dtype, known, compute, back)}; pass "
            "payload='auto' or 'plain'"
        )
    quantized = given or (can and payload != "plain")
    hidden = hidden_states.shape[1]
    scales = scales_of(hidden, block_shape is not None) if quantized else 0
    layout = RowLayout(hidden, top_k, row_dtype if row_dtype and quantized and not given else x_dtype, scales)
    return Formats(layout, back, combine_dtype, out_dtype or compute, quantized, given)


def _obstacle(
    quantization: str, row_dtype: torch.dtype | None, known: bool, compute: torch.dtype, back: torch.dtype
) -> str:
    if row_dtype is None:
        return f"quantization={quantization!r} multiplies hidden states of {compute}, not of 8 bits"
    if not known:
        return f"the experts compute in {compute} and send {back} back, which they cannot do with quantised rows"
    return "a1_scale is given, and the ranks that have the experts quantise by it"
