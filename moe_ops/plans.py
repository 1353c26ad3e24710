"""Plans of calls seen before: checking and planning a call costs as much host time as launching its kernels.

A plan depends on nothing but what is in the key (sizes, strides, dtypes, devices and alignments of the tensors, the
options, the overrides in force) and on the tables of tuned tiles, which a process reads once; so an entry cannot become
stale. Addresses are not in it.
"""

import operator
from collections.abc import Hashable

from torch import Tensor

from moe_ops import dispatch, env
from moe_ops.arguments import OPTION_ARGUMENTS, TENSOR_ARGUMENTS, Arguments
from moe_ops.devices import describe
from moe_ops.dispatch import Plan
from moe_ops.problem import Problem, make_problem

# Serving sees one entry per batch size and layer shape; a caller that never repeats itself must not fill the memory.
_MAX_ENTRIES = 4096
_ALIGNMENT = 16

_tensors, _options = operator.attrgetter(*TENSOR_ARGUMENTS), operator.attrgetter(*OPTION_ARGUMENTS)
_BLOCK_SHAPE = OPTION_ARGUMENTS.index("block_shape")

_plans: dict[Hashable, tuple[Problem, Plan]] = {}


def plan(args: Arguments) -> tuple[Problem, Plan]:
    """Checks a call and decides how it will run.

    Args:
        args: the call.

    Returns:
        Its description and its plan.

    Raises:
        ValueError, TypeError: the call is wrong, or its path or format cannot run. Errors are not kept.
    """
    key = _key(args)
    found = _plans.get(key) if key is not None else None
    if found is None:
        problem = make_problem(args)
        found = problem, dispatch.make_plan(problem, describe(args.hidden_states.device))
        if key is not None:
            if len(_plans) >= _MAX_ENTRIES:
                _plans.clear()
            _plans[key] = found
    return found


def _key(args: Arguments) -> Hashable | None:
    """Everything `make_problem` and `make_plan` look at; None for arguments that cannot be looked up."""
    facts: list[Hashable] = []
    for tensor in _tensors(args):
        if tensor is None:
            facts.append(None)
        elif isinstance(tensor, Tensor):
            alignment = tensor.data_ptr() % _ALIGNMENT
            facts.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, alignment))
        else:
            return None
    options = [*_options(args)]
    if args.block_shape is not None:  # a list, which has no hash
        options[_BLOCK_SHAPE] = tuple(args.block_shape)
    key = (*facts, *options, env.batch_invariant(), dispatch.current_override())
    try:
        hash(key)
    except TypeError:
        return None
    return key
