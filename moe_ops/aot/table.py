"""The launch table: what the C++ library launches for a call, in lines of text beside files of machine code.

A table is for one call, whatever its number of tokens M: `call_text` names it, and the library makes the same text of the
call it gets. Arguments have to be contiguous, so that sizes say all of them. A range of M with one form of launches is
an entry, whose numbers are formulas in M (reverse Polish, as `counts` has them; / rounds down)::

    moe_ops launches 1
    arch 90
    multiprocessors 132
    triton 3.6.0
    call hidden_states=bfloat16[M,2048] w1=bfloat16[128,1536,2048] ...
    kernel 5f3a0c1e.cubin up_kernel 128 65560 1    file, function, threads, dynamic shared memory, dependent launch
    tokens 3 4                              an entry: for M = 3 to 4
    out bfloat16 M 2048                     the result
    buffer M 8 * 768 * 2 *                  bytes of buffer0; the next is buffer1
    launch 0 M 8 * 24 *                     number of the kernel, number of programs
    pointer hidden_states 0                 its arguments: an argument of the call, "out" or a buffer, and an offset in bytes
    map w1 0 9 2 3 1 2 32 64                a tensor map: the same, then CUtensorMapDataType, bytes of an element,
    i32 128                                 CUtensorMapSwizzle, box; its shape (i32) and strides (i64) follow, which the
    ...                                     kernel gets too
    i64 M 8 * 127 + 128 /                   a number
    fp32 1065353216                         the bits of a number
"""

import hashlib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import triton

from moe_ops.aot.compiler import Kernel, TensorMap, compile_launch, float_bits
from moe_ops.aot.counts import as_text
from moe_ops.aot.recording import Launch, Operand, RecordedCall, record, symbolic_shape
from moe_ops.arguments import OPTION_ARGUMENTS, REQUIRED_TENSORS, TENSOR_ARGUMENTS, Arguments
from moe_ops.devices import Device

_HEAD = "moe_ops launches 1"
_DEFAULTS = {field.name: field.default for field in fields(Arguments) if field.default is not MISSING}
# What has no influence on the launches: all that is compiled is deterministic, and on the TMA path.
_LEFT_OUT = ("deterministic", "path")
_OPTIONS = tuple(name for name in OPTION_ARGUMENTS if name not in _LEFT_OUT)


def call_text(args: Arguments) -> str:
    """A call without its number of tokens, as a table and `python -m moe_ops aot --shapes` have it.

    Every tensor is there as dtype[sizes], and every option that has not its default::

        hidden_states=bfloat16[M,64] w1=bfloat16[8,64,64] ... topk_ids=int32[M,2] activation=gelu

    The C++ library makes the same text (csrc_stubs/launch_table.cpp).
    """
    words = [
        f"{name}={_dtype_text(tensor.dtype)}[{','.join(map(str, symbolic_shape(name, tuple(tensor.shape), 'M')))}]"
        for name, tensor in args.tensors().items()
    ]
    for name in _OPTIONS:
        value = getattr(args, name)
        # The one option whose default is another argument's.
        if value != _DEFAULTS[name] and not (name == "out_dtype" and value == args.hidden_states.dtype):
            words.append(f"{name}={_value_text(value)}")
    return " ".join(words)


def parse_call(text: str, num_tokens: int) -> Arguments:
    """The call of a text, with contiguous tensors that have no memory.

    Raises:
        ValueError: the text is none of a call; the message names the word.
    """
    values = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name in TENSOR_ARGUMENTS:
            values[name] = _parse_tensor(word, value, num_tokens)
        elif name in _OPTIONS and value:
            values[name] = _parse_option(word, name, value)
        else:
            raise ValueError(f"{word!r} is no argument, expected NAME=VALUE, with NAME one of the op's arguments")
    missing = [name for name in REQUIRED_TENSORS if name not in values]
    if missing:
        raise ValueError(f"{text!r} lacks {', '.join(missing)}; expected e.g. {missing[0]}=bfloat16[M,2048]")
    return Arguments(**values)


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _value_text(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:.17g}"
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    return value if isinstance(value, str) else f"[{','.join(map(str, value))}]"


def _parse_tensor(word: str, text: str, num_tokens: int) -> torch.Tensor:
    name, _, sizes = text.removesuffix("]").partition("[")
    dtype = getattr(torch, name, None)
    try:
        shape = [num_tokens if size == "M" else int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not isinstance(dtype, torch.dtype) or not shape or not text.endswith("]"):
        raise ValueError(f"{word!r} is no tensor, expected NAME=DTYPE[SIZE,...], e.g. w2=bfloat16[128,2048,768]")
    return torch.empty(shape, dtype=dtype, device="meta")


def _parse_option(word: str, name: str, text: str):
    default = _DEFAULTS[name]
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        if name == "out_dtype":
            return getattr(torch, text)
        if name == "block_shape":
            return [int(size) for size in text.strip("[]").split(",")]
        return text if isinstance(default, str) else float(text)
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{word!r} has no value of {name}") from None


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
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = device.capability
    kernels: dict[str, int] = {}
    lines = []
    text = call_text(parse_call(text, first))
    for begin, end, call in entries(text, first, last, device):
        lines += [f"tokens {begin} {end}", f"out {_dtype_text(call.out.dtype)} {' '.join(map(as_text, call.out.shape))}"]
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
    path = folder / f"{_digest(text.encode())}.launches"
    path.write_text("\n".join([*head, *lines]) + "\n")
    return path


def _kernel_line(kernel: Kernel, folder: Path) -> str:
    """A kernel as a table names it; its machine code is written, under a name that is its own."""
    file = f"{_digest(kernel.cubin)}.cubin"
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
