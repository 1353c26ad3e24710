"""The classic path: Triton kernels that reach every operand by pointers, whatever its strides. sm_80 and later."""

from collections.abc import Iterator

from torch import Tensor

from moe_ops.backends import pipeline
from moe_ops.dispatch import Plan
from moe_ops.problem import Arguments, Problem


def run(args: Arguments, problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Runs a call on the classic path; see `pipeline.run`."""
    return pipeline.run(args, problem, plan, out, None)


def stages(args: Arguments, problem: Problem, plan: Plan, out: Tensor) -> Iterator[str]:
    """Runs a call stage by stage; see `pipeline.stages`."""
    return pipeline.stages(args, problem, plan, out, None)
