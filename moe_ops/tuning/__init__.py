"""Tile configurations: what they are and how they are chosen."""

from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.heuristics import tile_configs

__all__ = ["TileConfig", "tile_configs"]
