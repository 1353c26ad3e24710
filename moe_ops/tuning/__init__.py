"""Tile configurations: what they are and how they are chosen."""

from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.heuristics import SPLIT_VARIANTS, down_splits, tile_configs
from moe_ops.tuning.lookup import tuned_tiles
from moe_ops.tuning.variants import VARIANTS, choose_variant, tiles_obstacle, variant_obstacle

__all__ = [
    "SPLIT_VARIANTS",
    "VARIANTS",
    "TileConfig",
    "choose_variant",
    "down_splits",
    "tile_configs",
    "tiles_obstacle",
    "tuned_tiles",
    "variant_obstacle",
]
