"""Gluon's language, and the little of Triton's that its kernels share, as functions on `values` and a `machine`.

Names that the kernels use and no more: one that is not here is an AttributeError, never a guess.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from moe_ops.kernels import compat
from moe_ops.testing.hopper import ptx
from moe_ops.testing.hopper.machine import Barrier, HopperError, Machine, Memory, begin_read, begin_write
from moe_ops.testing.hopper.values import (
    TORCH,
    Descriptor,
    Pointer,
    Shared,
    Value,
    computed,
    raw,
    register_steps,
)


class Language:
    """The functions of a program.

    Args:
        machine: what it runs on.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._functions: dict[int, Callable[..., Any]] = {}
        self._globals: dict[int, dict[str, Any]] = {}
        language = _Names(gl, self, (tl,))
        self._modules = {
            id(gl): language, id(tl): language, id(triton): SimpleNamespace(cdiv=lambda a, b: -(-int(a) // int(b))),
            id(mbarrier): SimpleNamespace(
                MBarrierLayout=lambda *_: mbarrier, init=self._init, expect=self._expect, arrive=self._arrive,
                wait=self._wait, invalidate=Barrier.invalidate,
            ),
            id(tma): SimpleNamespace(store_wait=self._store_wait),
            id(async_copy): SimpleNamespace(
                commit_group=machine.commit, wait_group=machine.wait_groups, mbarrier_arrive=self._arrive_after_copies
            ),
        }  # fmt: skip
        self._named = {
            id(hopper.fence_async_shared): machine.fence, id(hopper.warpgroup_mma): self._mma,
            id(hopper.warpgroup_mma_wait): self._mma_wait, id(compat.block_barrier): lambda: None,
            id(compat.cp_async): self._copy, id(compat.tma_load): self._tma_load, id(compat.tma_store): self._tma_store,
            id(compat.reinterpret): self._reinterpret, id(compat.gdc_wait): lambda: None,
            id(compat.gdc_launch_dependents): lambda: None,
        }  # fmt: skip

    def function(self, kernel: Any) -> Callable[..., Any]:
        """A function of Triton or Gluon as one of Python whose names mean what they mean here."""
        code = kernel.fn
        if id(code) not in self._functions:
            module = self._globals.get(id(code.__globals__))
            if module is None:
                module = self._globals[id(code.__globals__)] = {"range": self._range}
                module.update({name: self._meaning(value) for name, value in code.__globals__.items()})
            made = FunctionType(code.__code__, module, code.__name__, code.__defaults__, code.__closure__)
            made.__kwdefaults__ = code.__kwdefaults__
            self._functions[id(code)] = made
        return self._functions[id(code)]

    def _meaning(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return self._modules.get(id(value), value)
        if id(value) in self._named:
            return self._named[id(value)]
        if isinstance(value, tl.constexpr):
            return value.value
        if isinstance(value, JITFunction | InterpretedFunction):
            return functools.wraps(value.fn)(lambda *args, **kwargs: self.function(value)(*args, **kwargs))
        return value

    def _range(self, *bounds: Any) -> Iterator[Value]:
        """A loop's counter is a value, and not a number as in `static_range`."""
        return map(self.to_tensor, range(*(int(bound) for bound in bounds)))

    # The grid, constants, and what has no effect here.

    def program_id(self, axis: int) -> Value:
        return Value(torch.tensor(self._machine.program, dtype=torch.int32))

    def num_programs(self, axis: int) -> Value:
        return Value(torch.tensor(self._machine.programs, dtype=torch.int32))

    def num_warps(self) -> int:
        return self._machine.role.num_warps

    def static_range(self, *bounds: int) -> range:
        return range(*bounds)

    def static_assert(self, condition: Any, message: str = "") -> None:
        assert condition, message

    def _layout(self, *args: Any, **kwargs: Any) -> None:
        return None

    BlockedLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout = NVMMASharedLayout = _layout

    # Values.

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Value:
        return Value(torch.full(tuple(shape), value, dtype=TORCH[dtype]))

    def zeros(self, shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
        return self.full(shape, 0, dtype)

    def to_tensor(self, value: Any) -> Value:
        return value if isinstance(value, Value) else Value(torch.as_tensor(value, dtype=_of_number(value)))

    def where(self, condition: Any, a: Any, b: Any) -> Value:
        a, b = self._alike(a, b)
        return computed(torch.where, self.to_tensor(condition).to(tl.int1), a, b)

    def maximum(self, a: Any, b: Any, propagate_nan: Any = None) -> Value:
        return self._extreme(torch.maximum if _keeps_nan(propagate_nan) else torch.fmax, a, b)

    def minimum(self, a: Any, b: Any, propagate_nan: Any = None) -> Value:
        return self._extreme(torch.minimum if _keeps_nan(propagate_nan) else torch.fmin, a, b)

    def _extreme(self, operation: Callable[..., Tensor], a: Any, b: Any) -> Value:
        return computed(operation, *self._alike(a, b))

    def _alike(self, *operands: Any) -> list[Value]:
        """Operands as values; a number has the dtype of the other operand."""
        like = next((operand.dtype for operand in operands if isinstance(operand, Value)), None)
        values = [self.to_tensor(operand) for operand in operands]
        numbers = [like is not None and not isinstance(operand, Value) for operand in operands]
        return [value.to(like) if number else value for value, number in zip(values, numbers, strict=True)]

    def abs(self, x: Value) -> Value:
        return Value(x.data.abs())

    def exp(self, x: Value) -> Value:
        return Value(x.data.exp())

    def erf(self, x: Value) -> Value:
        return Value(x.data.erf())

    def div_rn(self, a: Any, b: Any) -> Value:
        return Value(torch.as_tensor(raw(a)) / torch.as_tensor(raw(b)))

    def join(self, a: Value, b: Value) -> Value:
        return Value(torch.stack([a.data, b.data], -1))

    def reduce(self, x: Value, axis: int, combine: Callable[[Value, Value], Value]) -> Value:
        data = x.data
        while data.shape[axis] > 1:
            left, right = data.chunk(2, axis)
            data = combine(Value(left), Value(right)).data
        return Value(data.squeeze(axis))

    def sum(self, x: Value, axis: int) -> Value:
        return Value(x.data.sum(axis, dtype=x.data.dtype))

    def convert_layout(self, x: Value, layout: Any, assert_trivial: bool = False) -> Value:
        return Value(x.data, registers=register_steps(layout))

    # Memory.

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, **options: Any) -> Value:
        if options.get("volatile"):
            self._machine.pause()
        allowed = None if mask is None else torch.as_tensor(raw(mask))
        place = pointer.place(allowed)
        # All lanes are masked off then, and an index would have nothing to take.
        if pointer.base.numel() == 0:
            values = torch.zeros(place.shape, dtype=pointer.base.dtype)
        else:
            values = pointer.base[place]
        if allowed is not None:
            instead = _nothing(pointer.base.dtype) if other is None else torch.as_tensor(other).to(pointer.base.dtype)
            values = torch.where(allowed, values, instead)
        return Value(values)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        allowed = None if mask is None else torch.as_tensor(raw(mask))
        place = pointer.place(allowed)
        values = torch.as_tensor(raw(value)).to(pointer.base.dtype)
        shape = torch.broadcast_shapes(place.shape, values.shape, () if allowed is None else allowed.shape)
        place, values = place.broadcast_to(shape), values.broadcast_to(shape)
        chosen = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed.broadcast_to(shape)
        pointer.base[place[chosen]] = values[chosen]

    def atomic_add(self, pointer: Pointer, value: Any, sem: str = "acq_rel") -> None:
        pointer.base[pointer.place(None)] += raw(value)

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout is mbarrier:
            return Barriers(shape[0])
        memory = Memory(list(shape), TORCH[dtype])
        self._machine.memories.append(memory)
        return Shared(memory, shape)

    def _reinterpret(self, view: Shared, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        if dtype != view.dtype:
            raise NotImplementedError("another dtype")
        return view.reshape(shape)

    # What goes on behind a role's back.

    def warp_specialize(self, tasks: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int],
                        registers: Sequence[int]) -> None:  # fmt: skip
        counts = [self._machine.role.num_warps, *warps]
        self._machine.run([
            (f"{task.__name__} ({i})", count, functools.partial(task, *args))
            for i, (count, (task, args)) in enumerate(zip(counts, tasks, strict=True))
        ])  # fmt: skip

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)

    def _expect(self, barrier: Barrier, bytes: int, pred: Any = True) -> None:
        if pred:
            barrier.transact(int(bytes))
            barrier.arrive()
        self._machine.pause()

    def _arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)
        self._machine.pause()

    def _wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            parity = int(phase)
            self._machine.wait(lambda: barrier.passed(parity), f"parity {parity} of a barrier in phase {barrier.phase}")

    def _tma_load(self, desc: Descriptor, start: Sequence[Any], barrier: Barrier, result: Shared) -> None:
        box, views = desc.load(start), result.views()
        begin_write(views, "a TMA load")

        def finish() -> None:
            views["data"].copy_(box.view(views["data"].shape))
            barrier.releases.append(lambda: views["writing"].sub_(1))
            barrier.transact(-box.numel() * box.itemsize)

        self._machine.launch("load", finish, loose=True)
        self._machine.pause()

    def _tma_store(self, desc: Descriptor, start: Sequence[Any], source: Shared) -> None:
        views, place = source.views(), [int(n) for n in start]
        begin_read(views, "a TMA store", proxy=True)
        box = views["data"].clone()

        def finish() -> None:
            desc.store(place, box)
            views["reading"].sub_(1)

        self._machine.launch("store", finish)
        self._machine.pause()

    def _store_wait(self, pendings: int) -> None:
        self._machine.wait_flights("store", pendings)

    def _copy(self, result: Shared, pointer: Pointer, mask: Any = None) -> None:
        values, views = self.load(pointer, mask, other=0).data, result.views()
        begin_write(views, "cp.async")

        def finish() -> None:
            views["data"].copy_(values)
            views["writing"].sub_(1)
            views["dirty"].fill_(True)

        self._machine.launch("copy", finish)
        self._machine.pause()

    def _arrive_after_copies(self, barrier: Barrier, increment_count: bool = True) -> None:
        if increment_count:
            raise NotImplementedError("a barrier that does not count the threads in advance")
        threads = 32 * self._machine.role.num_warps
        self._machine.launch("copy", lambda: barrier.arrive(threads), loose=True)

    def _mma(self, a: Any, b: Shared, acc: Value, use_acc: Any = True, is_async: bool = False) -> Value:
        reads = [view.views() for view in (a, b) if isinstance(view, Shared)]
        for views in reads:
            begin_read(views, "wgmma", proxy=True)
        left = a.views()["data"] if isinstance(a, Shared) else a.data
        total = left.float() @ b.views()["data"].float()
        if use_acc:
            # Sums that are on their way are in order.
            total = total + acc.unfinished

        def finish() -> None:
            for views in reads:
                views["reading"].sub_(1)

        flight = self._machine.launch("wgmma", finish)
        if not is_async:
            self._machine.wait_flights("wgmma")
        self._machine.pause()
        return Value(total, flight)

    def _mma_wait(self, num_outstanding: int, deps: Sequence[Any]) -> Any:
        self._machine.wait_flights("wgmma", num_outstanding)
        return deps[0] if len(deps) == 1 else tuple(deps)

    def inline_asm_elementwise(self, asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool,
                               pack: int) -> Any:  # fmt: skip
        """Runs PTX on elements, `pack` at once: in the order of a thread's registers where that is known."""
        if asm.startswith("bar."):
            number, threads = raw(args[0]), int(asm.split(";")[0].split(",")[1])
            self._machine.named_barrier(int(number), threads, asm.startswith("bar.sync"))
            return args[0]
        if "ld.global" in asm:
            word = self.load(args[0], mask=args[1].data != 0, other=0)
            return Value(word.data.view(TORCH[{1: tl.uint8, 2: tl.int16}[word.data.itemsize]]).to(torch.int32) &
                         (256**word.data.itemsize - 1))  # fmt: skip
        values = [self.to_tensor(arg) for arg in args]
        steps = next((value.registers for value in values if value.registers), ())
        dtypes = [TORCH[each] for each in (dtype if isinstance(dtype, tuple) else (dtype,))]
        made = [Value(result) for result in ptx.elementwise(asm, [value.data for value in values], dtypes, pack, steps)]
        return tuple(made) if isinstance(dtype, tuple) else made[0]


class _Names:
    """A module of names: those of `Language`, else dtypes and other classes of the modules themselves."""

    def __init__(self, module: ModuleType, functions: Language, others: tuple[ModuleType, ...]) -> None:
        self._modules, self._functions = (module, *others), functions

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._functions, name):
            return getattr(self._functions, name)
        for module in self._modules:
            value = getattr(module, name, None)
            if isinstance(value, tl.dtype | type):
                return value
        raise AttributeError(f"{name!r} of Triton's language is not known here")


class Barriers:
    """Barriers of a ring."""

    def __init__(self, count: int) -> None:
        self._barriers = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, i: Any) -> Barrier:
        if not 0 <= int(i) < len(self._barriers):
            raise HopperError("out of bounds", f"barrier {int(i)} of {len(self._barriers)}")
        return self._barriers[int(i)]


def _keeps_nan(propagate_nan: Any) -> bool:
    return propagate_nan is not None and "ALL" in str(propagate_nan)


def _of_number(value: Any) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.float32 if isinstance(value, float) else torch.int32


def _nothing(dtype: torch.dtype) -> Tensor:
    """What a lane has that loads nothing and says nothing of what it wants instead."""
    return torch.tensor(float("nan") if dtype.is_floating_point else -1).to(dtype)
