"""Devices by name, so that a plan can be made where they are not: facts for dispatch, and data-sheet ceilings."""

from dataclasses import dataclass, replace

import torch

from moe_ops.cli.limits import Rates
from moe_ops.devices import Device, describe, triton_facts

_KIB = 1024
# What hypothetical devices are described with where Triton is not installed: the oldest supported one.
_OLDEST_TRITON = "3.6.0"


@dataclass(frozen=True)
class Card:
    """A device and its ceilings, as its data sheet has them (dense products, no sparsity).

    Attributes:
        device: facts for dispatch.
        teraflops: of bf16 and fp16 products.
        byte_teraflops: of fp8 or int8 products; None where it has none.
        gigabytes: GB/s of its memory.
    """

    device: Device
    teraflops: float
    byte_teraflops: float | None
    gigabytes: float

    def rates(self, *, multiplies_bytes: bool) -> Rates:
        """The ceilings of a call."""
        return Rates(self.teraflops, self.gigabytes, self.byte_teraflops if multiplies_bytes else None)


def _card(name: str, capability: tuple[int, int], sms: int, shared_kib: int, *ceilings: float | None) -> Card:
    return Card(Device("cuda", name, capability, sms, shared_kib * _KIB), *ceilings)


CARDS = {
    "a100": _card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163, 312, 624, 2039),
    "rtx3090": _card("NVIDIA GeForce RTX 3090", (8, 6), 82, 99, 71, 142, 936),
    "rtx4090": _card("NVIDIA GeForce RTX 4090", (8, 9), 128, 99, 165, 330, 1008),
    "l40s": _card("NVIDIA L40S", (8, 9), 142, 99, 362, 733, 864),
    "h100": _card("NVIDIA H100 80GB HBM3", (9, 0), 132, 227, 989, 1979, 3350),
    "h200": _card("NVIDIA H200", (9, 0), 132, 227, 989, 1979, 4800),
    "h20": _card("NVIDIA H20", (9, 0), 78, 227, 148, 296, 4000),
    "b200": _card("NVIDIA B200", (10, 0), 148, 227, 2250, 4500, 8000),
    "rtx5090": _card("NVIDIA GeForce RTX 5090", (12, 0), 170, 99, 210, 419, 1792),
}
# An architecture stands for its best-known card.
ARCHITECTURES = {
    "sm_80": "a100", "sm_86": "rtx3090", "sm_89": "l40s", "sm_90": "h100", "sm_100": "b200", "sm_120": "rtx5090",
}  # fmt: skip


def known_card(name: str) -> Card:
    """A card by its name ("h200") or architecture ("sm_90"), described with the Triton that is installed.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    key = ARCHITECTURES.get(f"sm_{key[2:]}", key) if key.startswith("sm") else key
    if key not in CARDS:
        raise ValueError(f"{name!r} is not a device that is known: {', '.join((*CARDS, *ARCHITECTURES))}")
    version, has_descriptors = triton_facts()
    if version is None:
        version, has_descriptors = _OLDEST_TRITON, True
    card = CARDS[key]
    return replace(card, device=replace(card.device, triton=version, has_descriptors=has_descriptors))


def current_card() -> Card | None:
    """The current GPU, with the ceilings of the known card that it is, or of 0 if it is none; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    device = describe(torch.device("cuda", torch.cuda.current_device()))
    known = like(device.name)
    return replace(known, device=device) if known else Card(device, 0.0, None, 0.0)


def like(name: str) -> Card | None:
    """The known card that a device's name is of; the longest of their names that it contains."""
    text = name.lower().replace(" ", "").replace("-", "")
    matches = [key for key in CARDS if key in text]
    return CARDS[max(matches, key=len)] if matches else None
