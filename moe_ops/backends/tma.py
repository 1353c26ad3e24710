"""The TMA path: weights and the down GEMM's rows by descriptors made on the host and passed by value.

A descriptor made on the host needs no scratch memory and no allocator, and a CUDA graph captures it like a pointer.
"""

from collections.abc import Iterator

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops.backends import pipeline
from moe_ops.backends.launch import stored_weight
from moe_ops.dispatch import Plan
from moe_ops.problem import Arguments, Problem

# Boxes and shapes of a process are few; activations of many sizes must not fill the memory.
_MAX_TEMPLATES = 4096


def run(args: Arguments, problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Runs a call on the TMA path; see `pipeline.run`."""
    return pipeline.run(args, problem, plan, out, _DESCRIBE)


def stages(args: Arguments, problem: Problem, plan: Plan, out: Tensor) -> Iterator[str]:
    """Runs a call stage by stage; see `pipeline.stages`."""
    return pipeline.stages(args, problem, plan, out, _DESCRIBE)


def _w1(args: Arguments, problem: Problem, plan: Plan) -> TensorDescriptor:
    halves = problem.activation.gated and problem.gate_up_layout == "concatenated"
    rows = plan.up.block_n * (2 if problem.activation.gated and not halves else 1)
    w1 = stored_weight(args.w1, problem, plan)
    return _weight_descriptor(w1, rows, plan.up.block_k // plan.planes, halves=halves)


def _w2(args: Arguments, problem: Problem, plan: Plan) -> TensorDescriptor:
    w2 = stored_weight(args.w2, problem, plan)
    return _weight_descriptor(w2, plan.down.block_n, plan.down.block_k // plan.planes, halves=False)


def _act(act: Tensor, plan: Plan) -> TensorDescriptor:
    """Of rows, or of rows in planes: past the columns of one there are zeros, and not the next."""
    box = (plan.down.block_m, *(1,) * (act.ndim - 2), plan.down.block_k // plan.planes)
    return _descriptor(act, tuple(act.shape), act.stride(), box)


_DESCRIBE = pipeline.Describe(_w1, _w2, _act)


_templates: dict[tuple, TensorDescriptor] = {}


def _descriptor(base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]):
    """A descriptor of `base`, copied from one of the same form: checking a form costs more than a launch should.

    The forms hold no tensor, so they keep no memory alive; the base's alignment was checked with the plan.
    """
    key = (shape, strides, box, base.dtype)
    template = _templates.get(key)
    if template is None:
        template = TensorDescriptor(base, list(shape), list(strides), list(box))
        template.base = None
        if len(_templates) >= _MAX_TEMPLATES:
            _templates.clear()
        _templates[key] = template
    # As copy.copy does, in a tenth of its time.
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**template.__dict__, "base": base}
    return descriptor


def _weight_descriptor(weight: Tensor, rows: int, block_k: int, *, halves: bool) -> TensorDescriptor:
    """A descriptor of a weight [E, N, K], either K-major or N-major; the boxes are those of `kernels.grouped_gemm`."""
    num_experts, n, k = weight.shape
    expert, row, column = weight.stride()
    shape, strides, box = (n,), (row,), (rows,)
    if halves:
        shape, strides, box = (2, n // 2), (n // 2 * row, row), (2, rows)
    if column == 1:
        shape, strides, box = (*shape, k), (*strides, column), (*box, block_k)
    else:
        shape, strides, box = (k, *shape), (column, *strides), (block_k, *box)
    return _descriptor(weight, (num_experts, *shape), (expert, *strides), (1, *box))
