"""The ranks that share the experts, and the collectives between them, as ops that torch.compile traces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# By name: what wraps them has other names in other versions of torch, and gives a tensor subclass to eager callers.
_OPS = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """A process group, by name: no handle of it is kept, so that what holds one can be copied.

    Attributes:
        name: of the process group.
        rank: this process's.
        size: W.
        device: of the tensors it exchanges.
    """

    name: str
    rank: int
    size: int
    device: torch.device

    def all_to_all(self, x: Tensor, received: Sequence[int], sent: Sequence[int], what: str) -> Tensor:
        """Rows of every rank; `received` and `sent` count them by rank."""
        return self._run(what, lambda: _OPS.all_to_all_single(x, received, sent, self.name))

    def all_gather(self, x: Tensor, what: str) -> Tensor:
        """The same number of rows of every rank, one rank's behind the other's."""
        return self._run(what, lambda: _OPS.all_gather_into_tensor(x, self.size, self.name))

    def reduce_scatter(self, x: Tensor, what: str) -> Tensor:
        """This rank's share of the rows' sums over the ranks."""
        return self._run(what, lambda: _OPS.reduce_scatter_tensor(x, "sum", self.size, self.name))

    def _run(self, what: str, start: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            return _OPS.wait_tensor(start())
        try:
            return _OPS.wait_tensor(start())
        except RuntimeError as error:  # dist.DistBackendError is one, too
            raise RuntimeError(
                f"{what} failed on rank {self.rank} of {self.size}: {str(error).splitlines()[0]}; a rank of the group "
                f"has died, is slower than the group's timeout, or called with other sizes: check=True compares the "
                "ranks' arguments first"
            ) from error


def resolve_group(group: dist.ProcessGroup | DeviceMesh | None, device: torch.device | str | None = None) -> Group:
    """A group from what torch.distributed calls one.

    Args:
        group: a ProcessGroup, a DeviceMesh of one dimension (of a larger one: `mesh["ep"]`), or None: all processes.
        device: of the tensors; None: the current CUDA device for a group with NCCL, else the CPU.

    Returns:
        The group.

    Raises:
        ValueError: torch.distributed is not initialised, a mesh has more dimensions, or the process is not in it.
        TypeError: it is something else.
    """
    if not dist.is_initialized():
        raise ValueError(
            "ep_group needs torch.distributed, which is not initialised; call torch.distributed.init_process_group "
            "first, or start the program by torchrun"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names: tuple[object, ...] = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(
                f"ep_group is a DeviceMesh of {group.ndim} dimensions {names}, expected one; pass a dimension of it, "
                "such as mesh['ep']"
            )
        group = group.get_group()
    elif group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"ep_group is {type(group).__name__}, expected a ProcessGroup, a DeviceMesh or None")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("ep_group does not have this process; pass the group that it is in")
    if device is None:
        cuda = "nccl" in dist.get_backend(group) and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Group(group.group_name, rank, dist.get_world_size(group), device)
