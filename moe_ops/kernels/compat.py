"""What differs between the Triton versions that are supported (3.6 and later), behind one name each."""

import triton

# Programmatic dependent launch: the same names in all supported versions so far.
from triton.language.extra.cuda import gdc_launch_dependents as gdc_launch_dependents
from triton.language.extra.cuda import gdc_wait as gdc_wait

try:
    from triton.experimental.gluon import language as _gluon
    from triton.experimental.gluon.language.nvidia.ampere import async_copy as _async_copy
    from triton.experimental.gluon.language.nvidia.hopper import tma as _tma
except ImportError:
    # Gluon is experimental and may be absent or have moved; only the kernels written in it miss it.
    _gluon = _async_copy = _tma = None

# Triton's interpreter runs no inline PTX: kernels that have some have the same in Triton beside it.
INTERPRETED = triton.knobs.runtime.interpret


def _first(module, *names: str):
    """The first of these names that the module has, None if it has none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


# Gluon's names, newest first: where both are there, the old one may raise when it is used.
block_barrier = _first(_gluon, "barrier", "thread_barrier")  # 3.7
cp_async = _first(_async_copy, "async_load", "async_copy_global_to_shared")  # 3.8
tma_load = _first(_tma, "async_load", "async_copy_global_to_shared")  # 3.8
tma_store = _first(_tma, "async_store", "async_copy_shared_to_global")  # 3.8
reinterpret = _first(getattr(_gluon, "shared_memory_descriptor", None), "reinterpret", "_reinterpret")  # by 3.9


def settle_key(kernel) -> None:
    """Makes the key that a kernel has in Triton's cache on disk independent of what was compiled before it.

    Triton 3.6 leaves the constants of a function that has no key yet out of its caller's key, so that a process that
    compiles in another order does not find what is there. Here functions get theirs before their callers.
    """
    if not isinstance(kernel, triton.runtime.jit.JITCallable) or kernel.hash is not None:
        return  # a function of the interpreter, or it has one
    names = kernel.fn.__code__.co_names
    values = [kernel.__globals__.get(name) for name in names]
    modules = [value for value in values if isinstance(value, type(triton))]
    for value in [*values, *(getattr(module, name, None) for module in modules for name in names)]:
        settle_key(value)
    kernel.cache_key  # noqa: B018 - a property that keeps what it computes
