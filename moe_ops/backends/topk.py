"""The launch of the router."""

import triton
from torch import Tensor

from moe_ops.backends.launch import on_device
from moe_ops.kernels.topk import topk_route_kernel
from moe_ops.router import EPSILON, Router, empty_choice

# Scores of a warp: eight in each thread.
_PER_WARP = 256
_MOST_WARPS = 8


def topk_route(logits: Tensor, correction_bias: Tensor | None, router: Router) -> tuple[Tensor, Tensor]:
    """(weights, ids) of a checked call, in one launch on the device of `logits`."""
    weights, ids = empty_choice(logits, router)
    if len(logits) == 0:
        return weights, ids
    size = router.num_experts // router.num_groups
    tile = triton.next_power_of_2(router.num_groups), triton.next_power_of_2(size)
    with on_device(logits):
        topk_route_kernel[(len(logits),)](
            logits, None if correction_bias is None else correction_bias.contiguous(), weights, ids,
            router.routed_scaling_factor, *logits.stride(), TOP_K=router.top_k, GROUPS=router.num_groups, SIZE=size,
            TOP_GROUPS=router.topk_groups, SCORING=router.scoring, RENORMALIZE=router.renormalize,
            TOP2=router.group_score == "top2", EPSILON=EPSILON, GROUPS_POW2=tile[0], SIZE_POW2=tile[1],
            TOP_K_POW2=triton.next_power_of_2(router.top_k),
            num_warps=max(1, min(_MOST_WARPS, tile[0] * tile[1] // _PER_WARP)), enable_fp_fusion=True,
        )  # fmt: skip
    return weights, ids
