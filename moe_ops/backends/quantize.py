"""Launches that quantise rows: the hidden states, and the activation between the two GEMMs."""

import torch
from torch import Tensor

from moe_ops.backends.launch import Launcher, cdiv, dependent, next_power_of_2
from moe_ops.backends.scaled import ScaledRows
from moe_ops.dispatch import Plan, row_stride
from moe_ops.kernels.quantize import quantize_kernel
from moe_ops.problem import Arguments, Problem
from moe_ops.quantization.scheme import GROUP
from moe_ops.routing import Routing

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Elements a program quantises at least, and columns of a unit where the scale is given.
_ELEMENTS, _STATIC_COLUMNS = 4096, 1024


def empty_inputs(args: Arguments, problem: Problem) -> ScaledRows:
    """The hidden states as the up GEMM multiplies them: as they are or arrived, or buffers for `inputs` to fill.

    To be called before the sort of the routes: `inputs` does not wait for the sort, and memory that the sort gave back
    is not free yet when it writes.
    """
    x, scheme, given = args.hidden_states, problem.scheme, args.a1_scale
    if scheme.inputs_given:
        return given_rows(x, given)
    return empty(args, problem, scheme.inputs, x.shape, given) if scheme.inputs else ScaledRows(x)


def inputs(args: Arguments, problem: Problem, plan: Plan, rows: ScaledRows) -> None:
    """Quantises the hidden states. Launched after the sort of the routes, runs beside it, and ends after it.

    Args:
        args: the call.
        problem: its description.
        plan: how it runs.
        rows: from `empty_inputs`; written.
    """
    _launch("quantize x", args.hidden_states, rows, args.a1_scale, None, problem, plan)


def activation(args: Arguments, problem: Problem, plan: Plan, act: Tensor, routing: Routing) -> ScaledRows:
    """The activation as the down GEMM multiplies it.

    Args:
        args: the call.
        problem: its description.
        plan: how it runs.
        act: [max_rows, I] in the compute dtype, rows by expert.
        routing: the sorted routes.

    Returns:
        The same rows: quantised here, or as they are. Those without a route are not written.
    """
    if not problem.scheme.act:
        return ScaledRows(act)
    rows = empty_act(args, problem, plan)
    _launch("quantize act", act, rows, args.a2_scale, routing, problem, plan)
    return rows


def empty_act(args: Arguments, problem: Problem, plan: Plan) -> ScaledRows:
    """Buffers for the quantised activation, and its scales: given ones, or buffers for them."""
    shape = plan.max_rows, problem.intermediate_size
    return empty(args, problem, problem.scheme.act, shape, args.a2_scale)


def empty(args: Arguments, problem: Problem, granularity: str, shape: tuple[int, int], given: Tensor | None
          ) -> ScaledRows:  # fmt: skip
    """Buffers for quantised rows of a shape, with given scales or with buffers for scales per token or per group.

    Groups come first, so that neighbouring rows' scales lie side by side.
    """
    num_rows, columns = shape
    like, dtype = args.hidden_states, problem.scheme.row_dtype
    values = like.new_empty((num_rows, row_stride(columns)), dtype=dtype)[:, :columns]
    if given is not None:
        return ScaledRows(values, given, stride_expert=given.stride(0) if granularity == "expert" else 0)
    groups = cdiv(columns, GROUP) if granularity == "group" else 1
    scale = like.new_empty((groups, num_rows), dtype=torch.float32)
    return ScaledRows(values, scale, 1, num_rows if granularity == "group" else 0)


def given_rows(x: Tensor, scale: Tensor) -> ScaledRows:
    """Hidden states that arrive quantised, with an a1_scale of [1], [M, 1] or [M, H / 128]."""
    if scale.ndim == 1:
        return ScaledRows(x, scale)
    return ScaledRows(x, scale, scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0)


def _launch(name: str, x: Tensor, rows: ScaledRows, given: Tensor | None, routing: Routing | None, problem: Problem,
            plan: Plan) -> None:  # fmt: skip
    num_rows, columns = x.shape
    if given is not None:
        width = min(_STATIC_COLUMNS, next_power_of_2(columns))
    else:
        width = GROUP if rows.stride_group else next_power_of_2(columns)
    units = max(1, _ELEMENTS // width)
    Launcher(plan.kernels)(
        name, quantize_kernel, cdiv(num_rows * cdiv(columns, width), units),
        (x, rows.values, None if given is not None else rows.scale, given,
         *((None, None) if routing is None else routing[:2]),
         num_rows, problem.num_routes, columns, *x.stride(), rows.values.stride(0), *rows.strides),
        lambda: {
            "LARGEST": LARGEST[rows.values.dtype], "WIDTH": width, "UNITS": units, "BLOCK_M": plan.block_m,
            "num_warps": min(32, max(4, width * units // 2048)), **dependent(plan),
        },
    )  # fmt: skip
