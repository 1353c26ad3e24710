"""The layout every stage shares: routes sorted by expert, each expert padded to whole row blocks. Sizes and buffers."""

from typing import NamedTuple

import torch
from torch import Tensor

# On the device up to this many routes are sorted in one launch; more in three, by chunks of so many.
SMALL_ROUTES = 2048
CHUNK = 128

# Without a sort, routes of a token that a program of the down launch takes at a time.
TOKEN_ROUTES = 8

# Counters that the sort sets to zero for the GEMMs that want them: one each, in a line of the L2 of its own.
PROGRESS = (2, 32)


class Routing(NamedTuple):
    """Routes sorted by expert; R = M * top_k routes, route r = m * top_k + k.

    Attributes:
        sorted_routes: int32 [max_tiles * block]; the route of each row, R in padding rows.
        tile_experts: int32 [max_tiles]; the expert of each row block, -1 past the last one.
        num_padded: int32 [1]; rows in use, padding included.
        inverse: int32 [R]; the row of each route, -1 if it is dropped.
    """

    sorted_routes: Tensor
    tile_experts: Tensor
    num_padded: Tensor
    inverse: Tensor


def max_row_blocks(num_routes: int, num_experts: int, block: int) -> int:
    """Upper bound of the row blocks: every expert that has routes may add all but one row of padding.

    Works on symbolic sizes too.
    """
    # min would guard on a symbolic size; torch's takes ten times as long, in every call.
    occupied = min(num_routes, num_experts) if isinstance(num_routes, int) else torch.sym_min(num_routes, num_experts)
    return (num_routes + occupied * (block - 1)) // block


def workspace_bytes(num_routes: int, num_experts: int, block: int) -> int:
    """Device memory a sort takes: its result, and the counts of many routes by chunk and expert."""
    max_tiles = max_row_blocks(num_routes, num_experts, block)
    numbers = max_tiles * block + max_tiles + 1 + num_routes
    if num_routes > SMALL_ROUTES:
        numbers += num_experts * (-(-num_routes // CHUNK) + 1)
    return 4 * numbers


def empty_routing(topk_ids: Tensor, num_experts: int, block: int) -> Routing:
    """Buffers for the sort of `topk_ids`, from shapes alone."""
    num_routes = topk_ids.shape[0] * topk_ids.shape[1]
    max_tiles = max_row_blocks(num_routes, num_experts, block)
    sizes = (max_tiles * block, max_tiles, 1, num_routes)
    return Routing(*(topk_ids.new_empty((size,), dtype=torch.int32) for size in sizes))
