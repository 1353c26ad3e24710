"""Launches of the routing sort."""

import torch
from torch import Tensor

from moe_ops.backends.launch import Launcher, cdiv, next_power_of_2, on_device
from moe_ops.kernels import route as kernels
from moe_ops.routing import CHUNK, SMALL_ROUTES, Routing, empty_routing

_SMALL_CHUNK = 16
_TILES = 32
_SCAN_STEP = 1024


def sort_routes(
    topk_ids: Tensor,
    num_experts: int,
    block: int,
    expert_map: Tensor | None = None,
    launch: Launcher | None = None,
    dependent_launch: bool = False,
    zeroed: Tensor | None = None,
) -> Routing:
    """Sorts the routes of `topk_ids` [M, top_k] by expert on the tensor's device, without a host sync.

    With `dependent_launch` the caller's next kernel may start early: it has to wait before it reads the result.
    `zeroed`, int32 of a power of two of elements, is filled with zeros on the way.
    """
    launch = launch or Launcher(None)
    routing = empty_routing(topk_ids, num_experts, block)
    num_routes, max_tiles = routing.inverse.numel(), routing.tile_experts.numel()
    if num_routes == 0:
        routing.num_padded.zero_()
        return routing
    ids = topk_ids.contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    num_ids = num_experts if expert_map is None else expert_map.shape[0]

    def sizes() -> dict[str, int]:
        return {
            "NUM_EXPERTS": num_experts,
            "BINS": next_power_of_2(num_experts + 1),
            "BLOCK": block,
            "BLOCK_POW2": next_power_of_2(block),
            "TILES": _TILES,
            "ZEROED": 0 if zeroed is None else zeroed.numel(),
        }

    common = {"num_warps": 4, "PDL": dependent_launch}
    following = common | ({"launch_pdl": True} if dependent_launch else {})
    with on_device(ids):
        if num_routes <= SMALL_ROUTES:
            launch(
                "route", kernels.route_small_kernel,
                max(cdiv(num_routes, _SMALL_CHUNK), cdiv(max_tiles, _TILES)),
                (ids, expert_map, *routing, zeroed, num_routes, max_tiles, num_ids),
                lambda: {
                    **sizes(), "ROUTES": max(32, next_power_of_2(num_routes)), "CHUNK": _SMALL_CHUNK, **common
                },
            )  # fmt: skip
            return routing
        num_chunks = cdiv(num_routes, CHUNK)
        chunk_counts = ids.new_empty((num_experts, num_chunks), dtype=torch.int32)
        counts = ids.new_empty((num_experts,), dtype=torch.int32)
        launch(
            "count", kernels.count_kernel, num_chunks,
            (ids, expert_map, chunk_counts, routing.inverse, num_routes, num_chunks, num_ids),
            lambda: {"NUM_EXPERTS": num_experts, "BINS": next_power_of_2(num_experts + 1), "CHUNK": CHUNK, **common},
        )  # fmt: skip
        launch(
            "scan", kernels.scan_kernel, num_experts, (chunk_counts, counts, num_chunks),
            lambda: {"STEP": _SCAN_STEP, **following},
        )  # fmt: skip
        launch(
            "scatter", kernels.scatter_kernel, max(num_chunks, cdiv(max_tiles, _TILES)),
            (ids, expert_map, chunk_counts, counts, *routing, zeroed, num_routes, num_chunks, max_tiles, num_ids),
            lambda: {**sizes(), "CHUNK": CHUNK, **following},
        )  # fmt: skip
    return routing
