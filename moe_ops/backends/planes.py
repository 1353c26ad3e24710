"""Rows in planes: the columns that weights of one stored element multiply apart, each plane's side by side."""

from torch import Tensor

from moe_ops.backends.launch import Launcher, cdiv, dependent, next_power_of_2
from moe_ops.dispatch import Plan
from moe_ops.kernels.planes import planes_kernel

_BLOCK_K = 1024


def empty(like: Tensor, num_rows: int, columns: int, plan: Plan) -> Tensor:
    """[num_rows, planes, `plan.plane_width`] for rows as `kernels.layout.in_planes` has them."""
    return like.new_empty(num_rows, plan.planes, plan.plane_width(columns))


def fill(x: Tensor, rows: Tensor, plan: Plan) -> None:
    """rows = x in planes. Launched after the sort of the routes, runs beside it, and ends after it.

    Args:
        x: [M, H].
        rows: from `empty`, from before the sort; written.
        plan: how the call runs.
    """
    num_rows, columns = x.shape
    width = plan.planes * rows.shape[2]
    block_k = min(_BLOCK_K, next_power_of_2(width))
    Launcher(plan.kernels)(
        "planes", planes_kernel, num_rows * cdiv(width, block_k),
        (x, rows, columns, *x.stride(), rows.stride(0)),
        lambda: {"PLANES": plan.planes, "BLOCK_K": block_k, "num_warps": 4, **dependent(plan)},
    )  # fmt: skip
