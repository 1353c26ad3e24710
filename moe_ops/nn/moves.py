"""What `.to()` and its kin do to weights that are not numbers of a dtype of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def keep_dtype(fn: Callable[[Tensor], Tensor], kept: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """A function for `nn.Module._apply` that moves the given tensors as `fn` does, and leaves their dtype alone.

    `.to(dtype)` casts whatever counts as floating point, fp8 weights and scales included: of those it sees the bits.
    """
    ids = {id(tensor) for tensor in kept if tensor is not None}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in ids:
            return fn(tensor)
        return fn(tensor.view(_BITS[tensor.element_size()])).view(tensor.dtype)

    return move
