"""How a call across ranks will run: which way, why, and what it sends."""

from dataclasses import dataclass

import torch

from moe_ops.dispatch import Plan
from moe_ops.distributed.cost import Traffic


@dataclass(frozen=True)
class DistributedPlan:
    """How a call of `ExpertParallel.fused_moe` will run.

    Attributes:
        way: "gather" (all-gather of the tokens, reduce-scatter of the partial sums), "alltoall" (each token to the
            ranks of its experts, its partial sums back) or "local" (a group of one rank).
        reason: why this way, in words.
        num_rows: rows that this rank's experts see: exactly in ways of equal splits, else as expected.
        capacity: rows of each pair of ranks in an all-to-all of equal splits; None: splits are uneven, or there are
            none.
        host_syncs: how often sizes are read back to the host.
        capturable: a CUDA graph can hold the call, and torch.compile(fullgraph=True) traces it.
        payload_dtype: of the hidden states that travel.
        combine_dtype: of the partial sums that travel back.
        traffic: what this rank sends, as expected.
        op: how this rank's experts run those rows; None on a rank without experts.
    """

    way: str
    reason: str
    num_rows: int
    capacity: int | None
    host_syncs: int
    capturable: bool
    payload_dtype: torch.dtype
    combine_dtype: torch.dtype
    traffic: Traffic
    op: Plan | None
