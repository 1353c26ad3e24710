"""Questions about the memory a tensor covers, answered from its address, sizes and strides."""

import torch
from torch import Tensor


def may_overlap_itself(tensor: Tensor) -> bool:
    """Whether one element in memory may stand for several of the tensor, as in an expanded one."""
    if torch._debug_has_internal_overlap(tensor) == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def may_share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may have bytes in common: the ranges from first to last byte meet."""
    if not torch._C._overlaps(one, other):  # not one storage
        return False
    (first, end), (other_first, other_end) = _range(one), _range(other)
    return first < other_end and other_first < end


def _range(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last one; an empty range for a tensor without elements."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def merge_blocks(weight: Tensor) -> Tensor:
    """mxfp4 values as gpt-oss stores them, [E, N, K / 32, 16], as [E, N, K / 2]: the same memory, no copy.

    Args:
        weight: uint8; other shapes, and blocks that do not follow one another in memory, are returned as they are.

    Returns:
        A view.
    """
    if weight.ndim == 4 and weight.stride(2) == weight.shape[3] * weight.stride(3):
        return weight.view(*weight.shape[:2], -1)
    return weight
