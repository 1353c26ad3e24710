"""The launch of the router."""

from torch import Tensor

from moe_ops.backends.launch import facts_of, launcher_of, next_power_of_2, on_device
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
    bias = None if correction_bias is None else correction_bias.contiguous()
    with on_device(logits):
        launcher_of(router, facts_of(logits), facts_of(bias))(
            "topk", topk_route_kernel, len(logits),
            (logits, bias, weights, ids, router.routed_scaling_factor, *logits.stride()), lambda: _options(router),
        )  # fmt: skip
    return weights, ids


def _options(router: Router) -> dict[str, object]:
    size = router.num_experts // router.num_groups
    tile = next_power_of_2(router.num_groups), next_power_of_2(size)
    return {
        "TOP_K": router.top_k, "GROUPS": router.num_groups, "SIZE": size, "TOP_GROUPS": router.topk_groups,
        "SCORING": router.scoring, "RENORMALIZE": router.renormalize, "TOP2": router.group_score == "top2",
        "EPSILON": EPSILON, "GROUPS_POW2": tile[0], "SIZE_POW2": tile[1], "TOP_K_POW2": next_power_of_2(router.top_k),
        "num_warps": max(1, min(_MOST_WARPS, tile[0] * tile[1] // _PER_WARP)),
    }  # fmt: skip
