"""What Triton's interpreter computes differently from a GPU, put right: numbers of 8 bits, and products in bfloat16.

Its conversion to fp8 loses the carry of a mantissa that rounds up, and NaN; its bfloat16 are bit patterns to matmul.
It also patches `triton.language` again at every call of a device function, for half of its time: here once a launch.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
}
_BITS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}
_convert = interpreter._convert_float
_InterpreterBuilder = interpreter.InterpreterBuilder
_create_dot = _InterpreterBuilder.create_dot
_patch_lang = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
# Global variables of the functions for which the launch that runs has patched the language, by their identity.
_patched: set[int] = set()


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    target = _TORCH[dtype]
    _, integer = _BITS[target.itemsize]
    bits = np.ascontiguousarray(data).view(f"i{target.itemsize}" if target.itemsize > 1 else "u1")
    return torch.from_numpy(bits.copy()).view(integer).view(target)


def convert_float(data: np.ndarray, input_dtype: tl.dtype, output_dtype: tl.dtype, rounding_mode) -> np.ndarray:
    """Bits of one format -> bits of another, to the nearest, ties to even; out of range saturates in fp8."""
    if input_dtype not in _TORCH or output_dtype not in _TORCH:
        return _convert(data, input_dtype, output_dtype, rounding_mode)
    target = _TORCH[output_dtype]
    values = _to_torch(data, input_dtype).float()
    if target.itemsize == 1:
        largest = torch.finfo(target).max
        values = values.clamp(-largest, largest)
    unsigned, integer = _BITS[target.itemsize]
    return values.to(target).view(integer).numpy().view(unsigned).reshape(data.shape)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """As on the GPU for formats that numpy does not have; both operands have the same or are fp8."""
    dtypes = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    if a.dtype.scalar not in dtypes:
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(*(_to_torch(x.data, x.dtype.scalar).float().numpy() for x in (a, b)))
    return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def patch_lang(fn):
    """Patches nothing for a device function of a module that is done; only a launch, the first to come, restores."""
    if id(fn.__globals__) in _patched:
        return interpreter._LangPatchScope()
    _patched.add(id(fn.__globals__))
    return _patch_lang(fn)


def launch(self, *args, **kwargs):
    """A launch, which patches for itself."""
    _patched.clear()
    return _launch(self, *args, **kwargs)


def mend() -> None:
    """Puts them in place, for this process."""
    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = launch
    interpreter._convert_float = convert_float
    _InterpreterBuilder.create_dot = create_dot
