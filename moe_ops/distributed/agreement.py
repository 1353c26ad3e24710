"""Do the ranks agree? Asked before a collective whose sizes depend on it, which would hang or mix up memory."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_ops.distributed.groups import Group, resolve_group

_TOLD = 4


def check_agreement(
    group: dist.ProcessGroup | DeviceMesh | Group | None, facts: Mapping[str, object], error: Exception | None = None
) -> None:
    """Compares facts between the ranks of a group; where they differ, raises the same error on every rank.

    Two small all-gathers and two host syncs. The sizes of these depend on nothing that could differ.

    Args:
        group: as `ExpertParallel`.
        facts: values by name; two are the same if their `str` is. A name that a rank does not have counts as "absent".
        error: what is wrong on this rank alone; every rank then raises, and names this one.

    Returns:
        None: the ranks agree.

    Raises:
        ValueError: a fact differs, or a rank has an error; the message names the fact, the ranks and their values.

    Example:
        >>> import torch.distributed as dist
        >>> from moe_ops.distributed import check_agreement
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> check_agreement(None, {"H": 64})
        >>> dist.destroy_process_group()
    """
    group = group if isinstance(group, Group) else resolve_group(group)
    mine = {name: str(value) for name, value in facts.items()}
    text = json.dumps({"facts": mine, "error": None if error is None else f"{type(error).__name__}: {error}"})
    told = [json.loads(part) for part in _exchange(group, text.encode())]
    broken = [f"rank {rank}: {other['error']}" for rank, other in enumerate(told) if other["error"] is not None]
    if broken:
        raise ValueError(f"{'; '.join(broken[:_TOLD])}; no rank has sent anything") from error
    complaints = []
    names = list(dict.fromkeys(name for other in told for name in other["facts"]))
    for name in names:
        values = [other["facts"].get(name, "absent") for other in told]
        if len(set(values)) == 1:
            continue
        by_value: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            by_value.setdefault(value, []).append(rank)
        parts = [f"{value} on rank {', '.join(map(str, ranks[:8]))}" for value, ranks in by_value.items()]
        complaints.append(f"{name} is " + " and ".join(parts[:_TOLD]))
    if complaints:
        raise ValueError(
            f"the ranks of the group disagree: {'; '.join(complaints[:_TOLD])}; expected the same on every rank"
        )


def _exchange(group: Group, message: bytes) -> list[bytes]:
    """The bytes of every rank."""
    sizes = group.all_gather(torch.tensor([len(message)], device=group.device), "the check of the ranks").tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    everything = group.all_gather(padded.to(group.device), "the check of the ranks").cpu().view(group.size, -1)
    return [bytes(row[:size].tolist()) for row, size in zip(everything, sizes, strict=True)]
