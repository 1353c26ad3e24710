"""What the tuner and its workers tell each other: calls and tiles, as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from moe_ops.cli.calls import Sizes
from moe_ops.cli.formats import FORMATS, Format
from moe_ops.cli.problems import describe_call
from moe_ops.problem import Problem
from moe_ops.tuning import TileConfig
from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.table import Tiles


@dataclass(frozen=True)
class Call:
    """A call to tune.

    Attributes:
        sizes: (E, top_k, H, I).
        tokens: M.
        dtype: "bfloat16" or "float16".
        format: of the weights, "none" or one of `moe_ops.cli.formats.FORMATS`.
        path: "tma" or "classic".
    """

    sizes: Sizes
    tokens: int
    dtype: str
    format: str
    path: str

    @property
    def bucket(self) -> Bucket:
        """What its tiles are filed under."""
        experts, top_k, hidden, intermediate = self.sizes
        return Bucket(experts, hidden, intermediate, top_k, self.dtype, self.format, self.path)

    @property
    def form(self) -> Format | None:
        """Its format, None for weights that are not quantised."""
        return FORMATS.get(self.format)

    def problem(self) -> Problem:
        """The op's view of it.

        Raises:
            ValueError: the op would refuse the call.
        """
        return describe_call(self.sizes, self.tokens, getattr(torch, self.dtype), self.form, self.path)

    def to_json(self) -> dict[str, object]:
        """As a request carries it."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping) -> "Call":
        """What `to_json` gave."""
        return Call(**{**value, "sizes": tuple(value["sizes"])})


def tiles_to_json(tiles: Tiles) -> dict[str, object]:
    """Tiles as a request carries them."""
    return {"variant": tiles.variant, "up": asdict(tiles.up), "down": asdict(tiles.down)}


def tiles_from_json(value: Mapping) -> Tiles:
    """What `tiles_to_json` gave."""
    return Tiles(value["variant"], TileConfig(**value["up"]), TileConfig(**value["down"]))
