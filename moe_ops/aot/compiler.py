"""Recorded launches -> machine code, on a machine without a GPU, and what a launcher has to know beside it.

Triton compiles what it would compile for the same call (`JITFunction.warmup`); only numbers that depend on the number
of tokens are not specialised on, since one kernel has to serve them all.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager

from moe_ops.aot.counts import Count
from moe_ops.aot.cubin import parameter_sizes
from moe_ops.aot.recording import Launch
from moe_ops.kernels.compat import settle_key

# Neither 1 nor a multiple of 16, so that nothing is taken for granted of a number that it stands for.
_ANY_NUMBER = 17
_NUMBER_TYPES = {"i32": 4, "i64": 8, "fp32": 4}
_POINTER_BYTES, _TENSOR_MAP_BYTES = 8, 128
# Two pointers to scratch memory follow the arguments of every kernel. Ours need none.
_SCRATCH = [_POINTER_BYTES] * 2
# Triton numbers element types of tensor maps as the device does; cuda.h (CUtensorMapDataType) differs in three.
_MAP_DTYPES = {**{n: n for n in range(16)}, 8: 10, 9: 8, 10: 9}


@dataclass(frozen=True)
class TensorMap:
    """How a descriptor argument becomes a CUtensorMap.

    Attributes:
        dtype: a CUtensorMapDataType.
        element_size: bytes.
        swizzle: a CUtensorMapSwizzle.
        box: its sizes, the innermost last.
    """

    dtype: int
    element_size: int
    swizzle: int
    box: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: of the function.
        cubin: its code.
        num_warps: of a program.
        shared: bytes of dynamic shared memory.
        dependent: it may start while the launch before it finishes.
        arguments: what is passed: (index of the launch's argument, its type in Triton's words or a `TensorMap`).
    """

    name: str
    cubin: bytes
    num_warps: int
    shared: int
    dependent: bool
    arguments: tuple[tuple[int, str | TensorMap], ...]


class TargetDriver:
    """Answers Triton's questions about the device for a target that is not there.

    Args:
        arch: compute capability, 90 for 9.0.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The target."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """The one device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """No stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where Triton would allocate."""
        return torch.device("cpu")

    @property
    def launcher_cls(self):
        """What is made for every kernel that might be launched."""
        return lambda *args, **kwargs: None


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Within the block Triton takes the device for one of this compute capability."""
    previous = driver._active
    driver.set_active(TargetDriver(arch))
    try:
        yield
    finally:
        driver._active = previous


def compile_for(launch: Launch, arch: int):
    """What Triton compiles for a launch of operands and numbers. It is in Triton's cache on disk from then on.

    Args:
        launch: recorded, without symbols.
        arch: compute capability, 90 for 9.0.

    Returns:
        Triton's `CompiledKernel`.
    """
    kernel = launch.kernel
    settle_key(kernel)
    # Triton keeps kernels by device number, and this one is none of the machine's.
    kept = dict(kernel.device_caches)
    kernel.device_caches.clear()
    try:
        with target(arch):
            return kernel.warmup(*launch.args, grid=(1,), enable_fp_fusion=True, **launch.options)
    finally:
        kernel.device_caches.clear()
        kernel.device_caches.update(kept)


class _Asked(Exception):
    """Triton has asked its cache for a kernel; the arguments are its key, and whether it is there."""


def find_for(launch: Launch, arch: int) -> tuple[str, bool]:
    """Looks for what `compile_for` would compile in Triton's cache on disk, and compiles nothing.

    Args:
        launch: as `compile_for`.
        arch: as `compile_for`.

    Returns:
        The kernel's key in the cache, and whether it is there.
    """
    # Triton's own extension point: whatever keeps its kernels has this method, which a compilation calls first.
    manager = knobs.cache.manager_class or FileCacheManager

    class Asking(manager):
        """Ends a compilation at its first question."""

        def get_group(self, filename: str):
            raise _Asked(self.key, super().get_group(filename) is not None)

    try:
        with knobs.cache.scope():
            knobs.cache.manager_class = Asking
            compiled = compile_for(launch, arch)
    except _Asked as asked:
        key, there = asked.args
        return key, there
    return compiled.hash, True


def compile_launch(launch: Launch, arch: int) -> Kernel:
    """Compiles the kernel of a launch.

    Args:
        launch: recorded, or with numbers and tensors in the place of symbols.
        arch: compute capability, 90 for 9.0.

    Raises:
        RuntimeError: the kernel cannot be launched without Triton: this version of it compiles for another launcher.
    """
    kernel = launch.kernel
    compiled = compile_for(
        replace(launch, args=tuple(_ANY_NUMBER if isinstance(a, Count) else a for a in launch.args)), arch
    )
    metadata, cubin = compiled.metadata, compiled.asm["cubin"]
    arguments = tuple(_arguments(kernel.arg_names[: len(launch.args)], compiled))
    expected = [size for index, kind in arguments for size in _sizes(kind)] + _SCRATCH
    found = parameter_sizes(cubin, metadata.name)
    if found != expected:
        raise RuntimeError(f"{metadata.name} has parameters of {found} bytes, expected {expected}")
    if any(described["fp4_padded"] for described in metadata.tensordesc_meta or ()):
        raise RuntimeError(f"{metadata.name} has a tensor map of padded 4-bit elements, which is not made in C++")
    if (
        metadata.num_ctas != 1
        or metadata.launch_cooperative_grid
        or metadata.global_scratch_size + metadata.profile_scratch_size
    ):
        raise RuntimeError(f"{metadata.name} needs clusters, a cooperative launch or scratch memory; expected none")
    return Kernel(
        metadata.name, cubin, metadata.num_warps, metadata.shared, bool(metadata.launch_pdl), arguments
    )  # fmt: skip


def _arguments(names: list[str], compiled) -> Iterator[tuple[int, str | TensorMap]]:
    """Those arguments that are passed: Triton leaves out what it took for a constant."""
    maps = iter(compiled.metadata.tensordesc_meta or ())
    for index, name in enumerate(names):
        kind = compiled.src.signature[name]
        if kind.startswith("tensordesc"):
            described = next(maps)
            yield index, TensorMap(
                _MAP_DTYPES[described["elem_type"]], described["elem_size"], described["swizzle"],
                tuple(described["block_size"]),
            )  # fmt: skip
        elif kind != "constexpr":
            yield index, "pointer" if kind.startswith("*") else kind


def _sizes(kind: str | TensorMap) -> list[int]:
    """Bytes of the parameters that an argument takes: after a tensor map, shape and strides stand once more."""
    if isinstance(kind, TensorMap):
        rank = len(kind.box)
        return [_TENSOR_MAP_BYTES, *[4] * rank, *[8] * rank]
    return [_POINTER_BYTES if kind == "pointer" else _NUMBER_TYPES[kind]]


def float_bits(value: float) -> int:
    """The bits of a number in float32, as a launch passes it."""
    return struct.unpack("<I", struct.pack("<f", value))[0]
