"""Conditions of arguments that may be symbols, and the errors they raise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def require(condition: bool | torch.SymBool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raises `error(message())` unless the condition holds; on a symbol it becomes a guard or a runtime assertion."""
    if condition is True:
        return
    if isinstance(condition, torch.SymBool):
        torch._check_with(error, condition, message)
    elif not condition:
        raise error(message())


def require_name(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the names."""
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(f"{argument} is {value!r}, expected one of {names}")


def require_ndim(name: str, tensor: Tensor, form: str) -> None:
    """Raises ValueError unless the tensor has as many dimensions as `form`, such as "[M, H]"."""
    ndim = form.split("]")[0].count(",") + 1
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {ndim} dimensions: {form}")


def require_shape(name: str, tensor: Tensor, shape: Sequence[int], form: str) -> None:
    """Raises ValueError unless the tensor has this shape, which `form` explains."""

    def message() -> str:
        return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}: {form}"

    require(tensor.ndim == len(shape), message)
    for got, expected in zip(tensor.shape, shape, strict=True):
        require(got == expected, message)


def require_dtype(
    name: str, tensor: Tensor, allowed: Sequence[torch.dtype], reason: str = "", cure: str | None = None
) -> None:
    """Raises TypeError unless the tensor has one of the dtypes, the first of which is the one to cast to.

    Where a cast would lose what the tensor says, `cure` is the way out.
    """
    if tensor.dtype not in allowed:
        cure = cure or f"cast it: {name}.to({allowed[0]})"
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {either(allowed)}{reason}; {cure}")


def either(values: Sequence[object]) -> str:
    """ "a or b"."""
    return " or ".join(str(value) for value in values)
