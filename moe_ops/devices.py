"""Facts about a device that the choice of kernels depends on. Importing this imports neither Triton nor CUDA."""

import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What dispatch needs to know about a device; made by hand in tests, by `describe` otherwise.

    Attributes:
        kind: "cuda" or "cpu".
        name: the device's name.
        capability: CUDA compute capability; None on the CPU and on AMD.
        num_sms: streaming multiprocessors.
        shared_memory: bytes of shared memory one block may have.
        triton: version of Triton, None where it is not installed.
        has_descriptors: Triton can pass TMA descriptors made on the host.
        interpreted: TRITON_INTERPRET=1, so that Triton kernels run on CPU tensors.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None
    num_sms: int = 1
    shared_memory: int = 0
    triton: str | None = None
    has_descriptors: bool = False
    interpreted: bool = False


@functools.lru_cache(maxsize=1)
def triton_facts() -> tuple[str | None, bool]:
    """(version of Triton, whether it has TMA descriptors made on the host); (None, False) where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None, False
    return importlib.metadata.version("triton"), importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


@functools.lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """Describes a CUDA or CPU device; any other kind is described as itself and has no kernels."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")
    triton, has_descriptors = triton_facts() if device.type == "cuda" or interpreted else (None, False)
    if device.type != "cuda":
        return Device(
            kind=device.type,
            name=device.type,
            shared_memory=227 * 1024,
            triton=triton,
            has_descriptors=has_descriptors,
            interpreted=interpreted and device.type == "cpu",
        )
    properties = torch.cuda.get_device_properties(device)
    return Device(
        kind="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor) if torch.version.cuda else None,
        num_sms=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin if torch.version.cuda else 64 * 1024,
        triton=triton,
        has_descriptors=has_descriptors,
    )
