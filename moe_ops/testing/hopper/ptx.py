"""The inline PTX of the kernels, run in numpy: straight-line code on registers of 32 bits, many lanes at once.

What the kernels have and no more: an instruction that is not here is an error, never a guess. Approximations (ex2, rcp)
are computed to the nearest; a GPU's may differ in their last bits.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {"ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}
_JOIN: dict[str, Callable[..., np.ndarray]] = {"or": np.logical_or, "and": np.logical_and}
_TINY = np.float32(2.0**-126)


def elementwise(
    code: str, operands: list[Tensor], dtypes: list[torch.dtype], pack: int, steps: Sequence[Sequence[int]] = ()
) -> list[Tensor]:
    """Runs PTX on the elements of tensors.

    Args:
        code: as in `run`.
        operands: of dtypes of 16 or 32 bits; broadcast.
        dtypes: of the results.
        pack: elements that the code takes at once: two of 16 bits are a register.
        steps: in the tensors' shape, between the registers of a thread; without them elements come in order.

    Returns:
        The results.

    Raises:
        ValueError: as `run`.
        NotImplementedError: a dtype of other sizes.

    Example:
        >>> import torch
        >>> elementwise("add.s32 $0, $1, 2;", [torch.tensor([1, 5], dtype=torch.int32)], [torch.int32], 1)
        [tensor([3, 7], dtype=torch.int32)]
    """
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    order = _order(shape, tuple(tuple(step) for step in steps))
    groups = (operand.broadcast_to(shape).reshape(-1)[order].reshape(-1, pack) for operand in operands)
    registers = [register for group in groups for register in _packed(group)]
    counts = [max(1, pack * dtype.itemsize // 4) for dtype in dtypes]
    made, results = run(code, registers, sum(counts)), []
    for dtype, count in zip(dtypes, counts, strict=True):
        result = torch.empty(order.numel(), dtype=dtype)
        result[order] = _unpacked(made[:count], dtype, pack).reshape(-1)
        results.append(result.reshape(shape))
        made = made[count:]
    return results


def run(code: str, operands: list[np.ndarray], num_results: int) -> list[np.ndarray]:
    """Runs PTX.

    Args:
        code: instructions, with the results as $0, $1 and so on, and the operands behind them.
        operands: uint32, all of one shape.
        num_results: how many results there are.

    Returns:
        The results, uint32.

    Raises:
        ValueError: an instruction, a register or a constant that is not known here.

    Example:
        >>> import numpy as np
        >>> run("shl.b32 $0, $1, 4;", [np.array([3], np.uint32)], 1)[0].tolist()
        [48]
    """
    shape = operands[0].shape if operands else ()
    registers: dict[str, np.ndarray] = {f"${num_results + i}": operand for i, operand in enumerate(operands)}
    # Lanes that have jumped ahead, by the label at which they go on.
    jumped: dict[str, np.ndarray] = {}
    for guard, operation, names in _parsed(code):
        if operation == ":":
            jumped.pop(names[0], None)
            continue
        active = np.ones(shape, bool)
        for lanes in jumped.values():
            active &= ~lanes
        if jumped and not active.any():
            continue
        if guard:
            active &= registers[guard.lstrip("!")] ^ guard.startswith("!")
        if operation == "bra":
            jumped[names[0]] = jumped.get(names[0], np.zeros(shape, bool)) | active
            continue
        values = [_value(name, registers, shape) for name in names[1:]]
        result = _result(operation, values)
        before = registers.get(names[0])
        registers[names[0]] = result if before is None else np.where(active, result, before)
    if jumped:
        raise ValueError(f"no label for {', '.join(jumped)} in {code!r}")
    return [registers[f"${i}"].astype(np.uint32) for i in range(num_results)]


@functools.cache
def _parsed(code: str) -> list[tuple[str, str, list[str]]]:
    """(guard or "", operation, operands) of each instruction; a label is the operation ":"."""
    parsed = []
    for part in re.sub(r"(\w+:)", r"\1;", code.strip("{ }")).split(";"):
        statement, guard = part.strip(), ""
        if not statement or statement.startswith(".reg"):
            continue
        if statement.endswith(":"):
            parsed.append(("", ":", [statement[:-1]]))
            continue
        if statement.startswith("@"):
            guard, statement = statement[1:].split(None, 1)
        operation, _, rest = statement.partition(" ")
        parsed.append((guard, operation, [name.strip() for name in rest.split(",")]))
    return parsed


def _value(name: str, registers: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    if name in registers:
        return registers[name]
    if name == "%laneid":
        return np.zeros(shape, np.uint32)
    try:
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
    except ValueError:
        raise ValueError(f"{name!r} is no register that has a value, and no constant") from None
    return np.full(shape, number & 0xFFFFFFFF, np.uint32)


def _result(operation: str, values: list[np.ndarray]) -> np.ndarray:
    name, *kinds = operation.split(".")
    if name == "mov":
        return values[0]
    if name in ("add", "sub", "mul") and kinds[-1] != "f32":
        a, b = values
        return a + b if name == "add" else a - b if name == "sub" else a * b
    if name in ("shl", "shr"):
        a, b = values
        # A shift by 32 or more leaves nothing.
        shifted = a << (b & 31) if name == "shl" else a >> (b & 31)
        return np.where(b > 31, np.uint32(0), shifted)
    if name == "and":
        return values[0] & values[1]
    if name == "lop3":
        return _lop3(*values)
    if name == "setp":
        outcome = _COMPARE[kinds[0]](values[0], values[1])
        return outcome if len(values) == 2 else _JOIN[kinds[1]](outcome, values[2])
    if name == "selp":
        return np.where(values[2], values[0], values[1])
    if name == "fma" and kinds[-1] in _HALVES:
        x, y, z = (_halves(value, _HALVES[kinds[-1]]).double() for value in values)
        return _register((x * y + z).to(_HALVES[kinds[-1]]))
    if name == "cvt" and kinds[1] in _HALVES and kinds[2] == "f32":
        high, low = (torch.from_numpy(_float(value)) for value in values)
        return _register(torch.stack([low, high], -1).to(_HALVES[kinds[1]]))
    if kinds[-1] == "f32" and name in ("add", "mul", "ex2", "rcp"):
        return _float_result(name, "ftz" in kinds, [_float(value) for value in values])
    raise ValueError(f"{operation!r} is not known here")


def _float_result(name: str, flush: bool, values: list[np.ndarray]) -> np.ndarray:
    if flush:
        values = [_flushed(value) for value in values]
    with np.errstate(all="ignore"):
        if name == "add":
            result = values[0] + values[1]
        elif name == "mul":
            result = values[0] * values[1]
        else:
            wide = values[0].astype(np.float64)
            result = (np.exp2(wide) if name == "ex2" else 1 / wide).astype(np.float32)
    return np.ascontiguousarray(_flushed(result) if flush else result).view(np.uint32)


def _flushed(x: np.ndarray) -> np.ndarray:
    """x with zeros for subnormal numbers."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The bits of a, b and c looked up in a table of 8: bit 4 a + 2 b + c of it."""
    result, lookup = np.zeros_like(a), int(table.flat[0])
    for row in range(8):
        if lookup >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _float(register: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(register).view(np.float32)


def _halves(register: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A register's two numbers, the low one first. [..., 2]"""
    words = np.ascontiguousarray(register).view(np.int16)
    return torch.from_numpy(words).view(dtype).reshape(*register.shape, 2)


def _register(numbers: torch.Tensor) -> np.ndarray:
    """Numbers of 16 bits [..., 2] in a register."""
    return numbers.contiguous().view(torch.int32)[..., 0].numpy().view(np.uint32)


@functools.cache
def _order(shape: torch.Size, steps: tuple[tuple[int, ...], ...]) -> Tensor:
    """The places of a tensor's elements, those of a thread's registers side by side: `steps` apart in the shape."""
    places = torch.arange(math.prod(shape)).reshape(shape)
    registers = torch.zeros(1, dtype=torch.int64)
    for step in steps:
        registers = torch.cat([registers, registers + places[step]])
    # An element to which no step leads begins a thread.
    seen, order = set(), []
    for first in range(places.numel()):
        if first not in seen:
            order.append(first + registers)
            seen.update(order[-1].tolist())
    return torch.cat(order)


def _packed(groups: Tensor) -> list[np.ndarray]:
    """Groups of elements as registers of 32 bits."""
    if groups.dtype.itemsize == 4:
        return [column.contiguous().view(torch.int32).numpy().view(np.uint32) for column in groups.unbind(1)]
    if groups.dtype.itemsize != 2 or groups.shape[1] % 2:
        raise NotImplementedError(f"{groups.shape[1]} elements of {groups.dtype} in registers")
    words = groups.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return [words[:, i] | words[:, i + 1] << np.uint32(16) for i in range(0, words.shape[1], 2)]


def _unpacked(registers: list[np.ndarray], dtype: torch.dtype, pack: int) -> Tensor:
    """Registers of 32 bits as groups of elements."""
    stacked = np.stack(registers, 1)
    if dtype.itemsize == 4:
        return torch.from_numpy(stacked.view(np.int32)).view(dtype)
    words = np.stack([stacked & 0xFFFF, stacked >> 16], -1).astype(np.uint16).reshape(len(stacked), -1)
    return torch.from_numpy(words.view(np.int16)).view(dtype)[:, :pack]
