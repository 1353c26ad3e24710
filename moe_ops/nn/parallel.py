"""What `ep_group` of the modules means."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from moe_ops.distributed import ExpertParallel


def expert_parallel(
    group: "ProcessGroup | DeviceMesh | ExpertParallel | None", num_experts: int
) -> "ExpertParallel | None":
    """What runs the experts of all ranks; None where there is one."""
    if group is None:
        return None
    # Waits for its first use: modules of one process need no process group.
    from moe_ops.distributed import ExpertParallel

    if not isinstance(group, ExpertParallel):
        return ExpertParallel(group, num_experts)
    if group.num_experts != num_experts:
        raise ValueError(
            f"num_experts is {num_experts}, but ep_group has a placement of {group.num_experts} experts; make it anew"
        )
    return group
