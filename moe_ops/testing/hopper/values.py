"""What a kernel computes with when it is run in Python: tensors in registers, pointers, descriptors, shared memory.

They hold tensors of torch, and do what Triton's language does with its own: promotion, integer division towards zero,
conversions that saturate in fp8. Layouts are not looked at: where the compiler moves values between threads, it does so
rightly, and where it must not, the kernels have it assert that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from moe_ops.testing.hopper.machine import Flight, HopperError, Memory

TORCH = {
    tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.int1: torch.bool,
    tl.int8: torch.int8, tl.uint8: torch.uint8, tl.int16: torch.int16, tl.uint16: torch.uint16, tl.int32: torch.int32,
    tl.uint32: torch.uint32, tl.int64: torch.int64, tl.uint64: torch.uint64,
}  # fmt: skip
TRITON = {value: key for key, value in TORCH.items()}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Torch computes with few unsigned types: with these in the next signed one.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}


class Value:
    """A tensor in registers.

    Args:
        data: what it holds.
        flight: wgmma that make it; until they have ended it must not be looked at.
        registers: of a linear layout: the steps in its shape between the registers of a thread.
    """

    def __init__(self, data: Tensor, flight: Flight | None = None, registers: Sequence[list[int]] | None = None):
        self._data, self.flight, self.registers = data, flight, registers

    @property
    def data(self) -> Tensor:
        if self.flight is not None and not self.flight.done:
            raise HopperError("wait", "a result of wgmma is used before the wait for it")
        return self._data

    @property
    def unfinished(self) -> Tensor:
        """What it will hold, for wgmma that go on with it."""
        return self._data

    @property
    def dtype(self) -> Any:
        return TRITON[self._data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        target = TORCH[dtype]
        if bitcast:
            return Value(self.data.contiguous().view(target))
        data = self.data
        if target in _FP8 and data.is_floating_point():
            largest = torch.finfo(target).max
            data = data.float().clamp(-largest, largest)
        return Value(data.to(target))

    def reshape(self, *shape: Any) -> Value:
        return Value(self.data.reshape(_sizes(shape)))

    def permute(self, *dims: Any) -> Value:
        return Value(self.data.permute(_sizes(dims)))

    def broadcast_to(self, *shape: Any) -> Value:
        return Value(self.data.broadcast_to(_sizes(shape)))

    def split(self) -> tuple[Value, Value]:
        left, right = self.data.unbind(-1)
        return Value(left), Value(right)

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


class Pointer:
    """Addresses of elements of an argument: the argument, and offsets from its first element."""

    def __init__(self, base: Tensor, offsets: Tensor | int = 0) -> None:
        self.base, self.offsets = base, torch.as_tensor(offsets)

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        """Of a tensor's first element; out of bounds is what lies before it and behind the last, not gaps of a view."""
        extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((extent if tensor.numel() else 0,), (1,)))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=TRITON[self.base.dtype])

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.base, self.offsets + raw(step))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.base, self.offsets[index])

    def place(self, mask: Tensor | None) -> Tensor:
        """Where the elements are, 0 where the mask says that there is none."""
        offsets = self.offsets.long()
        if mask is not None:
            offsets, mask = torch.broadcast_tensors(offsets, mask)
            offsets = torch.where(mask, offsets, 0)
            if not mask.any():
                return offsets
        outside = (offsets < 0) | (offsets >= self.base.numel())
        if outside.any():
            at = int(offsets[outside].flatten()[0])
            raise HopperError("out of bounds", f"element {at} of an argument of {self.base.numel()} elements")
        return offsets


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, host: Any) -> None:
        self.block_shape, self.layout = [int(n) for n in host.block_shape], None
        self._view = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.dtype = TRITON[self._view.dtype]

    def _inside(self, start: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a box that is within the tensor: there, and in the box."""
        there, box = [], []
        for at, size, length in zip(start, self._view.shape, self.block_shape, strict=True):
            first, last = min(max(at, 0), size), max(min(at + length, size), 0)
            there.append(slice(first, max(first, last)))
            box.append(slice(first - at, max(first, last) - at))
        return tuple(there), tuple(box)

    def load(self, start: Sequence[Any]) -> Tensor:
        """A box; outside the tensor zeros."""
        there, inside = self._inside([int(n) for n in start])
        box = torch.zeros(self.block_shape, dtype=self._view.dtype)
        box[inside].copy_(self._view[there])
        return box

    def store(self, start: Sequence[Any], box: Tensor) -> None:
        """Stores a box; what is outside the tensor is dropped."""
        there, inside = self._inside([int(n) for n in start])
        self._view[there].copy_(box.reshape(self.block_shape)[inside])


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Memory, shape: Sequence[int], strides: Sequence[int] | None = None, first: int = 0):
        self.memory, self._shape, self._first = memory, list(shape), first
        self._strides = list(strides) if strides is not None else [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    @property
    def shape(self) -> list[int]:
        return self._shape

    @property
    def dtype(self) -> Any:
        return TRITON[self.memory.data.dtype]

    def views(self) -> dict[str, Tensor]:
        """The elements, and what is going on in each."""
        return {name: getattr(self.memory, name).as_strided(self._shape, self._strides, self._first)
                for name in ("data", "reading", "writing", "dirty")}  # fmt: skip

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < self._shape[0]:
            raise HopperError("out of bounds", f"stage {int(i)} of {self._shape[0]}")
        return Shared(self.memory, self._shape[1:], self._strides[1:], self._first + int(i) * self._strides[0])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if not 0 <= start <= start + length <= self._shape[dim]:
            raise HopperError("out of bounds", f"{start} to {start + length} of {self._shape[dim]}")
        shape = [*self._shape[:dim], length, *self._shape[dim + 1 :]]
        return Shared(self.memory, shape, self._strides, self._first + start * self._strides[dim])

    def reshape(self, *shape: Any) -> Shared:
        view = self.views()["data"].view(_sizes(shape))
        return Shared(self.memory, view.shape, view.stride(), self._first)

    def permute(self, *dims: Any) -> Shared:
        order = _sizes(dims)
        return Shared(self.memory, [self._shape[i] for i in order], [self._strides[i] for i in order], self._first)

    def load(self, layout: Any = None) -> Value:
        """Into registers."""
        views = self.views()
        if views["writing"].any():
            raise HopperError("race", "a load reads what a copy on its way is writing")
        return Value(views["data"].clone(), registers=register_steps(layout))

    def store(self, value: Value) -> None:
        """From registers."""
        views = self.views()
        if views["reading"].any() or views["writing"].any():
            raise HopperError("race", "a store writes what is being read or written")
        views["data"].copy_(value.data)
        views["dirty"].fill_(True)


def register_steps(layout: Any) -> Sequence[list[int]] | None:
    """The steps between a thread's registers of a linear layout; None of other layouts."""
    return getattr(layout, "reg_bases", None)


def raw(value: Any) -> Any:
    """What torch computes with: a tensor, or a number as it is."""
    if not isinstance(value, Value):
        return value
    data = value.data
    return data.to(_WIDER[data.dtype]) if data.dtype in _WIDER else data


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes given one by one, or in a sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size):
        sizes = tuple(sizes[0])
    return tuple(int(n) for n in sizes)


def computed(operation: Callable[..., Any], *operands: Any) -> Value:
    """An operation of torch on values and numbers; of 32 unsigned bits, if an operand has those."""
    result = torch.as_tensor(operation(*(raw(operand) for operand in operands)))
    for dtype in (operand.data.dtype for operand in operands if isinstance(operand, Value)):
        if _WIDER.get(dtype) == result.dtype:
            return Value((result & torch.iinfo(dtype).max).to(dtype))
    return Value(result)


def _towards_zero(a: Any, b: Any) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc") if isinstance(a, Tensor) or isinstance(b, Tensor) else a // b


def _operator(name: str, operation: Any) -> None:
    setattr(Value, f"__{name}__", lambda self, other: computed(operation, self, other))
    setattr(Value, f"__r{name}__", lambda self, other: computed(operation, other, self))


for _name, _operation in {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "truediv": lambda a, b: a / b,
    "floordiv": _towards_zero, "mod": lambda a, b: torch.fmod(torch.as_tensor(a), torch.as_tensor(b)),
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "lshift": lambda a, b: a << b,
    "rshift": lambda a, b: a >> b,
}.items():  # fmt: skip
    _operator(_name, _operation)
for _name, _operation in {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", lambda self, other, _operation=_operation: computed(_operation, self, other))
