"""Weight layouts of peers."""

from torch import Tensor


def interleave_gate_up(w1: Tensor) -> Tensor:
    """[E, 2 * I, H], gates before ups -> a copy with gate and up of a column side by side."""
    experts, rows, hidden = w1.shape
    return w1.view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(experts, rows, hidden)
