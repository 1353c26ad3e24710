"""State dicts of all experts -> those of one rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_ops.distributed.placement import Placement

# Of `FusedExperts`: every one has the experts in front.
OF_EXPERTS = ("w1", "w2", "w1_bias", "w2_bias", "w1_scale", "w2_scale", "w1_zero_point", "w2_zero_point")


def shard_state_dict(
    state_dict: Mapping[str, Tensor], placement: Placement, rank: int, prefix: str = "experts."
) -> dict[str, Tensor]:
    """Takes a rank's experts out of a state dict of `MoELayer`, `FusedExperts`, or a model that has several.

    What belongs to experts (`...experts.w1`, `w2`, and their biases, scales and zero points) keeps the rank's experts
    in its order, consecutive ones as views; everything else is passed on as it is.

    Args:
        state_dict: names and tensors, of all experts: [E, ...].
        placement: which rank has which experts.
        rank: whose.
        prefix: of the experts' names, wherever it stands in a name; "" for a state dict of `FusedExperts` itself.

    Returns:
        Names and tensors, [experts of the rank, ...], for `load_state_dict` of the same module with `ep_group`.

    Raises:
        ValueError: a tensor's first dimension is not `placement.num_experts`, or the rank is none of the placement's.

    Example:
        >>> from moe_ops.distributed import Placement, shard_state_dict
        >>> from moe_ops.nn import MoELayer
        >>> full = MoELayer(16, 8, num_experts=5, top_k=2).state_dict()
        >>> {name: list(t.shape) for name, t in sorted(shard_state_dict(full, Placement.even(5, 2), 1).items())}
        {'experts.w1': [2, 16, 16], 'experts.w2': [2, 16, 8], 'router.weight': [5, 16]}
    """
    if not 0 <= rank < placement.num_ranks:
        raise ValueError(f"rank is {rank}, expected 0 .. {placement.num_ranks - 1}, the ranks of the placement")
    mine = placement.experts[rank]
    sharded = {}
    for name, tensor in state_dict.items():
        head, _, last = name.rpartition(".")
        inside = f"{head}." if head else ""
        if last not in OF_EXPERTS or not inside.endswith(prefix):
            sharded[name] = tensor
            continue
        if tensor.ndim == 0 or tensor.shape[0] != placement.num_experts:
            raise ValueError(
                f"state_dict has {name} of shape {list(tensor.shape)}, expected [{placement.num_experts}, ...]: all "
                "experts of the placement; a state dict that is sharded already is loaded as it is"
            )
        if mine == tuple(range(mine[0], mine[-1] + 1)) if mine else True:
            sharded[name] = tensor[mine[0] : mine[-1] + 1] if mine else tensor[:0]
        else:
            index = torch.tensor(mine, device=tensor.device)
            # By bytes where the dtype has no copy by index.
            whole = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            sharded[name] = whole[index].view(tensor.dtype)
    return sharded
