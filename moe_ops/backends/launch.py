"""The one place kernels are launched from, and what all launches have to say of their arguments."""

import contextlib
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from moe_ops.dispatch import Plan
from moe_ops.kernels.compat import settle_key
from moe_ops.problem import Arguments, Problem


class Recorder(dict):
    """In the place of a plan's compiled kernels: its launches are written down instead of made (`moe_ops.aot`)."""

    def record(self, kernel, grid: int, args: tuple, options: dict) -> None:
        """Takes a launch: as `Launcher.__call__`, with the options themselves."""
        raise NotImplementedError


class Launcher:
    """Launches the kernels of one plan, and keeps what Triton compiled for it.

    To launch, Triton asks of every argument what it is specialised on (dtype, alignment, divisibility by 16, 1, None);
    for dozens of arguments that is most of a launch's cost. A plan fixes all of it: sizes, strides, dtypes and
    alignments of the inputs are what it was made from, and workspaces always have the allocator's alignment. What a
    plan does not fix has to be in the launch's name.

    Args:
        kept: compiled kernels by name, from earlier launches of the same plan; filled here. None keeps nothing.
    """

    def __init__(self, kept: dict | None) -> None:
        self._kept = kept

    def __call__(self, name: Hashable, kernel, grid: int, args: tuple, options: Callable[[], dict]) -> None:
        """Launches on a one-dimensional grid (the other dimensions end at 65535).

        Args:
            name: of the launch, with whatever its specialisation depends on beside the plan.
            kernel: a Triton or Gluon kernel.
            grid: number of programs.
            args: all arguments that are not constexpr, in order.
            options: gives constexprs and launch options; called when the kernel is not kept.
        """
        kept = None if self._kept is None else self._kept.get(name)
        if kept is not None:
            compiled, constexprs = kept
            compiled[(grid, 1, 1)](*args, *constexprs)
            return
        values = options()
        if isinstance(self._kept, Recorder):
            self._kept.record(kernel, grid, args, values)
            return
        settle_key(kernel)
        # FP fusion by name: Triton 3.10 turns it off by default.
        compiled = kernel[(grid,)](*args, enable_fp_fusion=True, **values)
        if self._kept is not None and compiled is not None:  # the interpreter compiles nothing
            self._kept[name] = compiled, tuple(values[constexpr] for constexpr in kernel.arg_names[len(args) :])


# Compiled kernels of launches that have no plan, by everything that they are specialised on; a program has few kinds.
_MAX_ENTRIES, _ALIGNMENT = 4096, 16
_kept: dict[Hashable, dict] = {}


def launcher_of(*facts: Hashable) -> Launcher:
    """For launches without a plan: of calls alike in the given facts, `facts_of` their tensors and all constexprs."""
    if facts not in _kept and len(_kept) >= _MAX_ENTRIES:
        _kept.clear()
    return Launcher(_kept.setdefault(facts, {}))


def facts_of(tensor: Tensor | None) -> Hashable:
    """What a kernel is specialised on of a tensor whose sizes it does not take; None of one that is not there."""
    if tensor is None:
        return None
    return tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % _ALIGNMENT


# Triton's own two take microseconds on the host, and every launch has some. Sizes may be those of `moe_ops.aot.counts`,
# which write down the operators that they meet.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    n = n - 1
    for shift in (1, 2, 4, 8, 16, 32):
        n |= n >> shift
    return n + 1


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def dependent(plan: Plan, follows: bool = True) -> dict[str, bool]:
    """Options of programmatic dependent launch; the first kernel of a call follows nobody and waits for everything."""
    options = {"PDL": plan.dependent_launch}
    return options | {"launch_pdl": True} if plan.dependent_launch and follows else options


def bias_and_stride(bias: Tensor | None) -> tuple[Tensor | None, int]:
    """A bias [E, N] whose rows are contiguous, and the elements from one expert to the next."""
    if bias is None:
        return None, 0
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    return bias, bias.stride(0)


def weight_scales(args: Arguments, problem: Problem, which: str) -> tuple[Tensor | int | None, ...]:
    """Scales and zero points of "w1" or "w2", each with its strides over experts, rows and groups; 0 where shared."""
    if not problem.scheme.quantized:
        return None, 0, 0, 0, None, 0, 0, 0
    scale, zero_point = getattr(args, f"{which}_scale"), getattr(args, f"{which}_zero_point")
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    strides = (*scale.stride(), 0, 0)[:3]
    return (scale, *strides, zero_point, *((0, 0, 0) if zero_point is None else zero_point.stride()))


def stored_weight(weight: Tensor, problem: Problem, plan: Plan) -> Tensor:
    """A weight in the elements that the kernels read: two bytes at once where `plan.planes` says so."""
    return weight.view(torch.int16) if plan.planes > problem.scheme.planes else weight


def activation_constexprs(problem: Problem) -> dict[str, object]:
    """What the kernels of the up GEMM have to know of the activation."""
    return {
        "ACTIVATION": problem.activation.name,
        "GATED": problem.activation.gated,
        "INTERLEAVED": problem.gate_up_layout == "interleaved",
        "HAS_LIMIT": problem.limit is not None,
    }


def format_constexprs(problem: Problem) -> dict[str, object]:
    """What the kernels have to know of the format of the weights."""
    scheme = problem.scheme
    return {"FORMAT": scheme.name, "SCALE_ROWS": scheme.scale_rows, "SCALE_COLUMNS": scheme.scale_columns}


def result_launch(stage: str, out: Tensor, reduce_topk: bool) -> tuple[Hashable, tuple[int, int, int]]:
    """The name of the launch that writes the result, and the result's strides over tokens, slots and columns.

    The caller's own buffer (`fused_moe_tma_`) is not among what the plan was made from, so it is in the name.
    """
    strides = (out.stride(0), 0, out.stride(1)) if reduce_topk else out.stride()
    return (stage, out.stride(), out.data_ptr() % 16), strides


def unit(*sizes: int) -> int:
    """What all sizes are multiples of, 32, 16 or 8, else 1: what the compiler has to know to load 16 bytes at once."""
    return next((n for n in (32, 16, 8) if all(size % n == 0 for size in sizes)), 1)


def scale_unit(scale: Tensor | None) -> int:
    """What the strides from expert to expert and from row to row of a weight's scales are multiples of, up to 16."""
    strides = () if scale is None else scale.stride()[:2]
    return next(n for n in (16, 8, 4, 2, 1) if all(stride % n == 0 for stride in strides))


def weight_constexprs(weight: Tensor) -> dict[str, object]:
    """What the kernels have to know of a weight's strides."""
    n_major = weight.stride(2) != 1
    return {"N_MAJOR": n_major, "W_UNIT": unit(weight.stride(0), weight.stride(2 if n_major else 1))}
