"""Rows that may be quantised, with the scales that give them back."""

from typing import NamedTuple

from torch import Tensor


class ScaledRows(NamedTuple):
    """Rows of a GEMM. Row r stands for values[r, k] * scale, whose scale lies at r * stride_row + g * stride_group.

    Attributes:
        values: [rows, K], quantised; in the compute dtype where there is no scale.
        scale: float32, of any shape; None without.
        stride_row: elements of `scale` from one row to the next; 0 where all rows share it.
        stride_group: elements of `scale` from one group of 128 columns (g = k // 128) to the next; 0 without groups.
    """

    values: Tensor
    scale: Tensor | None = None
    stride_row: int = 0
    stride_group: int = 0
