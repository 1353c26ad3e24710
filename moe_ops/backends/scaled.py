"""Rows that may be quantised, with the scales that give them back."""

from typing import NamedTuple

from torch import Tensor


class ScaledRows(NamedTuple):
    """Rows of a GEMM: row r of expert e stands for values[r, k] times the scale at this offset::

        r * stride_row + (k // 128) * stride_group + e * stride_expert

    Attributes:
        values: [rows, K], quantised; in the compute dtype where there is no scale.
        scale: float32, of any shape; None without.
        stride_row: elements of `scale` from one row to the next; 0 where all rows share it.
        stride_group: elements of `scale` from one group of 128 columns to the next; 0 without groups.
        stride_expert: elements of `scale` from one expert to the next; 0 where all share it.
    """

    values: Tensor
    scale: Tensor | None = None
    stride_row: int = 0
    stride_group: int = 0
    stride_expert: int = 0

    @property
    def strides(self) -> tuple[int, int, int]:
        """(stride_row, stride_group, stride_expert)."""
        return self.stride_row, self.stride_group, self.stride_expert
