"""The one place kernels are launched from."""

import contextlib

import torch
from torch import Tensor


def launch(kernel, grid: int, *args, **options) -> None:
    """Launches a Triton kernel on a one-dimensional grid (the other dimensions end at 65535).

    FP fusion is asked for by name: Triton 3.10 turns it off by default.
    """
    kernel[(grid,)](*args, enable_fp_fusion=True, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
