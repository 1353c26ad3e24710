"""A memory checker for Triton kernels in Triton's interpreter: every lane of every load and store is looked at.

Pointers carry their origin: a tensor argument reaches a kernel as its address plus a tag in bits 48 to 63, which no
address uses and all pointer arithmetic keeps. A lane is therefore held against the tensor its pointer was made from,
and a step from one tensor into its neighbour is found. Found are

    out of bounds    a lane that is not masked off and is not an element of its tensor, the gaps of a strided view
                     included
    race             an element that two programs of one launch store, or that one stores and a later one loads
    uninitialised    a load of memory from torch.empty and its kin that nobody has written since
    overflow         a sum, difference or product of signed integers below 64 bits whose exact value does not fit

Descriptor (TMA) accesses: what lies outside the descriptor's shape is clipped by definition, as the hardware does;
what lies inside is held against the tensor the descriptor was made from, like any other access. A box has no mask: it
may load uninitialised elements beside others, as the poison in them shows where they reach a result, but not only such.

Not seen: a load before another program's store (the interpreter runs programs one after the other), lanes of one store
that hit one element, races between atomics, overflow inside tl.sum and tl.cumsum, and loads in torch operations.
"""

import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64(2**48 - 1)
# What fresh memory is filled with. Another byte proves a write, by a kernel or by torch; this one may be a value.
_POISON = 0xFD
_CHECKED = {np.add: "+", np.subtract: "-", np.multiply: "*"}
_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


class SanitizerError(AssertionError):
    """A fault in a kernel.

    Attributes:
        fault: "out of bounds", "race", "uninitialised" or "overflow".
        kernel: name of the kernel.
        program: its program ids (x, y, z).
        argument: the pointer's argument; None for an overflow.
        offset: in elements from the argument's first, negative in front of it; None for an overflow.
        line: "file:line: source" of the fault, the kernel's own or a function's it calls; "" if there is no source.
    """

    def __init__(
        self, fault: str, what: str, kernel: str, program: tuple[int, int, int], argument: str | None = None,
        offset: int | None = None, line: str = "",
    ) -> None:  # fmt: skip
        at = f"\n  {line}" if line else ""
        super().__init__(f"{fault}: {kernel}, program {program}: {what}{at}")
        self.fault, self.kernel, self.program = fault, kernel, program
        self.argument, self.offset, self.line = argument, offset, line


@dataclass
class Report:
    """What was watched: a clean run that watched nothing proves nothing.

    Attributes:
        launches: how often each kernel was launched.
        loads: lanes loaded.
        stores: lanes stored.
    """

    launches: Counter[str] = field(default_factory=Counter)
    loads: int = 0
    stores: int = 0


@contextlib.contextmanager
def sanitized() -> Iterator[Report]:
    """Watches the kernels that Triton's interpreter runs in the block, and raises at the first fault.

    Also fills memory that is allocated without a value in the block. Not for several threads at a time.

    Returns:
        What has been watched; filled as kernels run.

    Raises:
        RuntimeError: Triton does not interpret: TRITON_INTERPRET=1 was not set when it was imported.
        SanitizerError: by the calls in the block: a kernel has a fault.

    Example:
        >>> from moe_ops.testing.sanitizer import sanitized
        >>> with sanitized() as report:  # doctest: +SKIP
        ...     moe_ops.fused_moe(x, w1, w2, topk_weights, topk_ids, path="tma")
        >>> report.launches["up_kernel"]  # doctest: +SKIP
        1
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles here: set TRITON_INTERPRET=1 before the process starts")
    watch = _Watch(interpreter)
    builder = interpreter.InterpreterBuilder
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (interpreter.GridExecutor, "__call__"),
            (interpreter, "_implicit_cvt"),
            (builder, "binary_op"),
            (builder, "create_masked_load"),
            (builder, "create_masked_store"),
            (builder, "create_descriptor_load"),
            (builder, "create_atomic_rmw"),
            (builder, "create_atomic_cas"),
        ):
            hook = getattr(watch, name.strip("_"))
            stack.enter_context(mock.patch.object(owner, name, _before(hook, getattr(owner, name))))
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _before(watch.allocate, getattr(owner, name))))
        yield watch.report


def _before(hook, original):
    """A function in the place of `original` that hands it to `hook`; methods get their self like any argument."""

    def wrapper(*args, **kwargs):
        return hook(original, *args, **kwargs)

    return wrapper


class _Memory:
    """One storage; an element is known by its first byte."""

    def __init__(self, storage: torch.UntypedStorage, fresh: bool) -> None:
        self.storage = storage  # kept, so that no other takes its address while it is known here
        self.bytes = np.zeros(0, np.uint8)
        if fresh:
            self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self.bytes.fill(_POISON)
        self.written = np.zeros(self.bytes.size, bool)
        self._writers = np.zeros(0, np.int32)
        self._launch = 0

    def stored_by_others(self, at: np.ndarray, itemsize: int, launch: int, program: int) -> np.ndarray:
        """Which of the elements at these bytes another program of the launch has stored."""
        if self._launch != launch:
            return np.zeros(at.shape, bool)
        writers = self._writers[at // itemsize]
        return (writers != 0) & (writers != program)

    def store(self, at: np.ndarray, itemsize: int, launch: int, program: int) -> None:
        """Remembers that a program, above 0, stored the elements at these bytes."""
        if self._launch != launch:
            # By element. Zeros that are never looked at take no memory, however large the storage is.
            self._launch, self._writers = launch, np.zeros(self.storage.nbytes() // itemsize, np.int32)
        self._writers[at // itemsize] = program
        if self.written.size:
            self.written[at] = True

    def unwritten(self, at: np.ndarray, itemsize: int) -> np.ndarray:
        """Which of the elements at these bytes nobody has written."""
        if not self.bytes.size:
            return np.zeros(at.shape, bool)
        content = self.bytes[at[:, None] + np.arange(itemsize)]
        return ~self.written[at] & (content == _POISON).all(1)


class _Argument:
    """A tensor argument of a launch, directly or under a descriptor."""

    def __init__(self, name: str, tensor: Tensor, memory: _Memory) -> None:
        self.name, self.memory, self.address = name, memory, tensor.data_ptr()
        self.shape, self.strides, self.itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
        self._start = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
        pairs = [(stride, size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1]
        # From the longest step down; a step of 0 leads to the same elements again.
        self._steps = sorted((pair for pair in pairs if pair[0]), reverse=True)
        self._empty = tensor.numel() == 0
        inner = 0
        for stride, size in reversed(self._steps):
            if stride <= inner:
                # Elements of such a view have no one index: the range it covers has to do.
                self._steps = [(1, 1 + sum(stride * (size - 1) for stride, size in self._steps))]
                break
            inner += stride * (size - 1)

    def contains(self, offsets: np.ndarray) -> np.ndarray:
        """Which byte offsets from the first element are those of elements."""
        rest, misaligned = np.divmod(offsets, self.itemsize)
        outside = (misaligned != 0) | (rest < 0) | self._empty
        for stride, size in self._steps:
            rest = rest - np.minimum(rest // stride, size - 1) * stride
        return ~outside & (rest == 0)

    def in_storage(self, offsets: np.ndarray) -> np.ndarray:
        """Byte offsets from the first element -> from the storage's beginning."""
        return offsets + self._start


class _Watch:
    """The hooks. Each gets the function it stands before, and that function's arguments."""

    def __init__(self, interpreter) -> None:
        self._interpreter = interpreter
        self._builder = interpreter.interpreter_builder
        self._memories: dict[int, _Memory] = {}
        self._kernel = ""
        self._names: Iterator[str] = iter(())
        self._arguments: list[_Argument] = []
        self._allocating = self._in_box = False
        self._launch = 0
        self.report = Report()

    def call(self, original, executor, *args, **kwargs):
        """A launch."""
        self._launch += 1
        self._kernel = executor.fn.__name__
        self.report.launches[self._kernel] += 1
        given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        # In the order in which the interpreter converts them.
        self._names = iter(
            [
                name
                for key in executor.arg_names
                if key in given and key not in executor.constexprs
                for name in _pointer_names(key, given[key])
            ]
        )
        self._arguments = []
        try:
            return original(executor, *args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SanitizerError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None  # the interpreter wraps it once for every function on the way

    def implicit_cvt(self, original, value):
        """An argument on its way into the kernel: tags pointers."""
        converted = original(value)
        if hasattr(value, "data_ptr"):
            tensor = getattr(value, "base", value)  # a reinterpreted tensor
            storage = tensor.untyped_storage()
            memory = self._memories.setdefault(storage.data_ptr(), _Memory(storage, fresh=False))
            self._arguments.append(_Argument(next(self._names), tensor, memory))
            converted.handle.data = converted.handle.data | np.uint64(len(self._arguments)) << _TAG_SHIFT
        return converted

    def allocate(self, original, *args, **kwargs):
        """torch.empty or one of its kin, which may call each other."""
        if self._allocating:
            return original(*args, **kwargs)
        self._allocating = True
        try:
            tensor = original(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.numel():
                storage = tensor.untyped_storage()
                self._memories[storage.data_ptr()] = _Memory(storage, fresh=True)
            return tensor
        finally:
            self._allocating = False

    def create_masked_load(self, original, builder, pointers, mask, *rest, **options):
        """A load, by pointers or by a descriptor."""
        self.report.loads += self._check(pointers, mask, "loads")
        return original(builder, self._untagged(pointers), mask, *rest, **options)

    def create_descriptor_load(self, original, *args):
        """A load of a box; becomes a masked load."""
        self._in_box = True
        try:
            return original(*args)
        finally:
            self._in_box = False

    def create_masked_store(self, original, builder, pointers, value, mask, *rest):
        """A store, by pointers or by a descriptor."""
        self.report.stores += self._check(pointers, mask, "stores")
        return original(builder, self._untagged(pointers), value, mask, *rest)

    def create_atomic_rmw(self, original, builder, operation, pointers, value, mask, *rest):
        """An atomic update."""
        self._check(pointers, mask, "updates")
        return original(builder, operation, self._untagged(pointers), value, mask, *rest)

    def create_atomic_cas(self, original, builder, pointers, *rest):
        """An atomic exchange."""
        self._check(pointers, None, "updates")
        return original(builder, self._untagged(pointers), *rest)

    def binary_op(self, original, builder, lhs, rhs, operation):
        """Arithmetic: overflow of signed integers."""
        dtype = lhs.dtype.scalar
        if operation in _CHECKED and dtype.is_int_signed() and 8 <= dtype.int_bitwidth < 64:
            exact = operation(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            wrong = (exact < -(2 ** (dtype.int_bitwidth - 1))) | (exact >= 2 ** (dtype.int_bitwidth - 1))
            if wrong.any():
                first = int(np.argmax(wrong))
                one, other = (np.broadcast_to(side.data, exact.shape).flat[first] for side in (lhs, rhs))
                what = f"{one} {_CHECKED[operation]} {other} = {exact.flat[first]} does not fit into {dtype}"
                self._fail("overflow", what)
        return original(builder, lhs, rhs, operation)

    def _untagged(self, pointers):
        return self._interpreter.TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def _check(self, pointers, mask, verb: str) -> int:
        """Looks at the lanes of an access and remembers what it writes. Returns their number."""
        active = np.asarray(pointers.data)
        active = active.ravel() if mask is None else active[np.broadcast_to(np.asarray(mask.data, bool), active.shape)]
        count = active.size
        while active.size:
            # One turn as a rule: pointers of several arguments meet only in a tl.where of pointers.
            tags = active >> _TAG_SHIFT
            same = tags == tags[0]
            if not 0 < tags[0] <= len(self._arguments):
                self._fail("out of bounds", f"{verb} through {int(active[0]):#x}, made from no argument")
            argument = self._arguments[int(tags[0]) - 1]
            addresses = (active[same] & _ADDRESS).astype(np.int64)
            self._check_argument(argument, addresses - argument.address, verb)
            active = active[~same]
        return count

    def _check_argument(self, argument: _Argument, offsets: np.ndarray, verb: str) -> None:
        def fail_where(wrong: np.ndarray, fault: str, what: str) -> None:
            if wrong.any():
                offset = int(offsets[wrong][0]) // argument.itemsize
                self._fail(
                    fault,
                    f"{verb} {argument.name}[{offset}], {what} ({int(wrong.sum())} of {wrong.size} lanes; "
                    f"shape {list(argument.shape)}, strides {list(argument.strides)})",
                    argument.name,
                    offset,
                )

        fail_where(~argument.contains(offsets), "out of bounds", "which is no element of it")
        memory, at = argument.memory, argument.in_storage(offsets)
        if verb != "stores":
            unwritten = memory.unwritten(at, argument.itemsize)
            if self._in_box and not unwritten.all():
                unwritten[:] = False
            fail_where(unwritten, "uninitialised", "which nobody has written since it was allocated")
        accesses = (at, argument.itemsize, self._launch, self._program_number())
        if verb != "updates":
            fail_where(memory.stored_by_others(*accesses), "race", "which another program of the launch has stored")
        if verb == "stores":
            memory.store(*accesses)

    def _program_number(self) -> int:
        x, y, z = self._builder.grid_idx
        return 1 + x + self._builder.grid_dim[0] * (y + self._builder.grid_dim[1] * z)

    def _fail(self, fault: str, what: str, argument: str | None = None, offset: int | None = None) -> None:
        raise SanitizerError(fault, what, self._kernel, self._builder.grid_idx, argument, offset, _source_line())


def _pointer_names(name: str, value) -> Iterator[str]:
    """A name for every tensor in an argument: the argument's own, with an index inside tuples."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _pointer_names(f"{name}[{i}]", item)
    elif hasattr(value, "data_ptr") or isinstance(getattr(value, "base", None), Tensor):
        yield name


def _source_line() -> str:
    """The innermost line that is neither Triton's nor this file's: the kernel's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package = frame.f_globals.get("__name__", "")
        file = frame.f_code.co_filename
        if file != __file__ and not package.startswith("triton."):
            return f"{file}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""
