"""The launch table: what the C++ library launches for a call, in lines of text beside files of machine code.

A table is for one call, whatever its number of tokens M: `call_text` names it, and the library makes the same text of
the call it gets. Arguments have to be contiguous, so that sizes say all of them. A range of M with one form of launches
is an entry, whose numbers are formulas in M (reverse Polish, as `counts` has them; / rounds down)::

    moe_ops launches 1
    arch 90
    multiprocessors 132
    triton 3.6.0
    call hidden_states=bfloat16[M,2048] w1=bfloat16[128,1536,2048] ...
    kernel 5f3a0c1e.cubin up_kernel 128 65560 1    file, function, threads, dynamic shared memory, dependent launch
    tokens 3 4                    an entry: for M = 3 to 4
    out bfloat16 M 2048           the result
    buffer M 8 * 768 * 2 *        bytes of buffer0; the next is buffer1
    launch 0 M 8 * 24 *           number of the kernel, number of programs
    pointer hidden_states 0       its arguments: an argument of the call, "out" or a buffer, and an offset in bytes
    map w1 0 9 2 3 1 2 32 64      a tensor map: the same, then CUtensorMapDataType, bytes of an element,
    i32 128                       CUtensorMapSwizzle and box; its shape (i32) and strides (i64) follow, which the
    ...                           kernel gets too
    i64 M 8 * 127 + 128 /         a number
    fp32 1065353216               the bits of a number
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import triton

from moe_ops.aot.calls import call_text, dtype_text, parse_call
from moe_ops.aot.compiler import Kernel, TensorMap, compile_launch, float_bits
from moe_ops.aot.counts import as_text
from moe_ops.aot.recording import Launch, Operand, RecordedCall, record
from moe_ops.devices import Device

_HEAD = "moe_ops launches 1"


def entries(text: str, first: int, last: int, device: Device) -> Iterator[tuple[int, int, RecordedCall]]:
    """(first M, last M, launches) for every range of M with one form of launches, from `first` to `last`.

    Args:
        text: the call.
        first: least number of tokens, at least 1.
        last: largest number of tokens.
        device: where it will run.

    Raises:
        ValueError, TypeError: the call is wrong, or does not take the TMA path there.
    """
    while first <= last:
        call, end = record(parse_call(text, first), device), first
        while end < last and call.trace.holds(end + 1):
            end += 1
        yield first, end, call
        first = end + 1


def write_table(folder: Path, text: str, first: int, last: int, device: Device) -> Path:
    """Compiles a call for a range of numbers of tokens, and writes table and machine code into a folder.

    Tables of other calls in the folder stay, one of the same call is replaced.

    Args:
        folder: made if it is not there.
        text: the call.
        first: least number of tokens, at least 1.
        last: largest number of tokens.
        device: where it will run.

    Returns:
        The table's file.

    Raises:
        ValueError, TypeError: the call is wrong, or does not take the TMA path there.
        RuntimeError: the kernels of this version of Triton cannot be launched without it.
    """
    text = call_text(parse_call(text, first))
    recorded = list(entries(text, first, last, device))
    # Not before: a call that is wrong leaves no folder.
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = device.capability
    kernels: dict[str, int] = {}
    lines = []
    for begin, end, call in recorded:
        lines += [
            f"tokens {begin} {end}",
            f"out {dtype_text(call.out.dtype)} {' '.join(map(as_text, call.out.shape))}",
        ]
        lines += [f"buffer {as_text(nbytes)}" for nbytes in call.recording.buffers]
        for launch in call.recording.launches:
            kernel = compile_launch(launch, 10 * major + minor)
            number = kernels.setdefault(_kernel_line(kernel, folder), len(kernels))
            lines.append(f"launch {number} {as_text(launch.grid)}")
            lines += argument_lines(launch, kernel)
    head = [
        _HEAD, f"arch {10 * major + minor}", f"multiprocessors {device.num_sms}", f"triton {triton.__version__}",
        f"call {text}", *kernels,
    ]  # fmt: skip
    path = folder / f"{digest(text.encode())}.launches"
    path.write_text("\n".join([*head, *lines]) + "\n")
    return path


def _kernel_line(kernel: Kernel, folder: Path) -> str:
    """A kernel as a table names it; its machine code is written, under a name that is its own."""
    file = f"{digest(kernel.cubin)}.cubin"
    (folder / file).write_bytes(kernel.cubin)
    return f"kernel {file} {kernel.name} {32 * kernel.num_warps} {kernel.shared} {int(kernel.dependent)}"


def argument_lines(launch: Launch, kernel: Kernel) -> Iterator[str]:
    """The arguments of a launch, those that are passed."""
    for index, kind in kernel.arguments:
        value = launch.args[index]
        if isinstance(kind, TensorMap):
            facts = (kind.dtype, kind.element_size, kind.swizzle, *kind.box)
            yield f"map {_place(value.base)} {' '.join(map(str, facts))}"
            yield from (f"i32 {as_text(size)}" for size in value.shape)
            yield from (f"i64 {as_text(stride)}" for stride in value.strides)
        elif kind == "pointer":
            yield f"pointer {_place(value)}"
        else:
            yield f"{kind} {float_bits(value) if kind == 'fp32' else as_text(value)}"


def _place(operand: Operand) -> str:
    return f"{operand.name} {operand.data_ptr()}"


def digest(data: bytes) -> str:
    """A name for a file that has this content, and for none of another."""
    return hashlib.sha256(data).hexdigest()[:16]
