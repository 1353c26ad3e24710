"""Expert parallelism on torch.distributed: every rank has some of the experts, and tokens of its own.

`ExpertParallel` is the op across a process group; `moe_ops.nn.MoELayer(..., ep_group=...)` a layer with it.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError(
        "moe_ops.distributed needs torch.distributed, which this build of torch does not have; install another build"
    )

from moe_ops.distributed.agreement import check_agreement
from moe_ops.distributed.cost import WAYS, Network, Traffic, choose_way, estimate, expected_share
from moe_ops.distributed.experts import CapacityError, ExpertParallel
from moe_ops.distributed.placement import Placement
from moe_ops.distributed.plan import DistributedPlan
from moe_ops.distributed.state import shard_state_dict

__all__ = [
    "WAYS",
    "CapacityError",
    "DistributedPlan",
    "ExpertParallel",
    "Network",
    "Placement",
    "Traffic",
    "check_agreement",
    "choose_way",
    "estimate",
    "expected_share",
    "shard_state_dict",
]
