"""What a call launches, written down instead of launched: operands without memory, launches with their arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_ops.aot.calls import symbolic_shape
from moe_ops.aot.counts import Count, Trace
from moe_ops.arguments import TENSOR_ARGUMENTS, Arguments
from moe_ops.backends import tma
from moe_ops.backends.launch import Recorder
from moe_ops.devices import Device
from moe_ops.dispatch import Plan, make_plan
from moe_ops.problem import Problem, make_problem

Size = int | Count


@dataclass(frozen=True)
class Operand:
    """A tensor without memory: all that backends ask of a tensor, for sizes that are symbols.

    Attributes:
        name: of the memory: an argument's name, "out", or "buffer0", "buffer1" and so on.
        shape: its sizes.
        strides: in elements.
        dtype: of its elements.
        allocate: size in bytes -> the name of new memory.
        offset: of its first element, in elements.
    """

    name: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    allocate: Callable[[Size], str]
    offset: int = 0

    # No GPU's, so that nobody makes one the current one.
    device = torch.device("meta")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def stride(self, dim: int | None = None):
        """The stride of a dimension, or all of them."""
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> Size:
        """Number of elements."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """The address in its memory: what alignment depends on, as all memory is aligned well."""
        return self.offset * self.dtype.itemsize

    def contiguous(self) -> "Operand":
        """Itself: a table is for contiguous arguments, see `table`."""
        return self

    def new_empty(self, *shape, dtype: torch.dtype | None = None) -> "Operand":
        """An operand with memory of its own."""
        if len(shape) == 1 and isinstance(shape[0], tuple):
            shape = shape[0]
        dtype = dtype or self.dtype
        name = self.allocate(math.prod(shape) * dtype.itemsize)
        return replace(self, name=name, shape=shape, strides=contiguous_strides(shape), dtype=dtype, offset=0)

    def view(self, dtype: torch.dtype) -> "Operand":
        """The same memory with elements of another dtype, as wide or wider."""
        factor = dtype.itemsize // self.dtype.itemsize
        if factor < 1:
            raise ValueError(f"elements of {self.dtype} cannot be seen as {dtype}, which is narrower")
        return replace(
            self, shape=(*self.shape[:-1], self.shape[-1] // factor), dtype=dtype, offset=self.offset // factor,
            strides=(*(stride // factor for stride in self.strides[:-1]), self.strides[-1]),
        )  # fmt: skip

    def __getitem__(self, index) -> "Operand":
        """One slice of the first dimension, `[i]`, or the first columns of all rows, `[:, :n]`."""
        if isinstance(index, int):
            return replace(
                self, shape=self.shape[1:], strides=self.strides[1:], offset=self.offset + index * self.strides[0]
            )
        rows, columns = index
        if (rows, columns.start, columns.step) != (slice(None), None, None):
            raise ValueError(f"{index} is no [i] and no [:, :n]")
        return replace(self, shape=(self.shape[0], columns.stop))


@dataclass(frozen=True)
class Launch:
    """A launch.

    Attributes:
        kernel: a Triton or Gluon kernel.
        grid: number of programs.
        args: all arguments that are not constexpr, in order: operands, numbers, descriptors of operands, None.
        options: constexprs and launch options.
    """

    kernel: Any
    grid: Size
    args: tuple
    options: dict[str, Any]


class Recording(Recorder):
    """The launches of a call and the memory they need.

    Attributes:
        launches: in order.
        buffers: bytes of each workspace, in the order of their names "buffer0", "buffer1" and so on
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.buffers: list[Size] = []

    def record(self, kernel, grid: Size, args: tuple, options: dict[str, Any]) -> None:
        """Writes a launch down. A constexpr that depends on the number of tokens is one of the trace's conditions."""
        options = {name: int(value) if isinstance(value, Count) else value for name, value in options.items()}
        self.launches.append(Launch(kernel, grid, args, options))

    def allocate(self, nbytes: Size) -> str:
        """Notes a workspace; returns its name."""
        self.buffers.append(nbytes)
        return f"buffer{len(self.buffers) - 1}"


@dataclass(frozen=True)
class RecordedCall:
    """A call as a symbol of its number of tokens.

    Attributes:
        problem: what it asks for.
        plan: how it runs.
        out: its result.
        recording: its launches.
        trace: for which numbers of tokens all of this holds.
    """

    problem: Problem
    plan: Plan
    out: Operand
    recording: Recording
    trace: Trace


def record(args: Arguments, device: Device) -> RecordedCall:
    """Writes down what a call launches, for its number of tokens and all that launch alike.

    Args:
        args: the call; its tensors may be meta ones.
        device: where it will run.

    Raises:
        ValueError, TypeError: the call is wrong, or does not take the TMA path there.
    """
    problem = make_problem(args)
    trace, recording = Trace(problem.num_tokens), Recording()
    problem = replace(problem, num_tokens=trace.tokens)
    plan = make_plan(problem, device)
    if plan.path != "tma":
        raise ValueError(f"the call takes path {plan.path!r} ({plan.reason}), and only 'tma' is compiled ahead of time")
    operands = {
        name: Operand(name, shape, contiguous_strides(shape), tensor.dtype, recording.allocate)
        for name, tensor in args.tensors().items()
        for shape in [symbolic_shape(name, tuple(tensor.shape), trace.tokens)]
    }
    shape = problem.out_shape
    out = Operand("out", shape, contiguous_strides(shape), problem.out_dtype, recording.allocate)
    symbolic = replace(args, **{name: operands.get(name) for name in TENSOR_ARGUMENTS})
    tma.run(symbolic, problem, replace(plan, kernels=recording), out)
    return RecordedCall(problem, plan, out, recording, trace)


def contiguous_strides(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The strides of a tensor without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
