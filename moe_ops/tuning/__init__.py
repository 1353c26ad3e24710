"""Tile configurations: what they are and how they are chosen."""

from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.heuristics import VARIANTS, choose_variant, tile_configs

__all__ = ["VARIANTS", "TileConfig", "choose_variant", "tile_configs"]
