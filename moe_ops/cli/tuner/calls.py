"""What the tuner and its workers tell each other: calls and tiles, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction

import torch

from moe_ops.arguments import Arguments
from moe_ops.cli.calls import Sizes
from moe_ops.cli.formats import FORMATS, Format
from moe_ops.cli.problems import describe_arguments, describe_call
from moe_ops.problem import Problem
from moe_ops.tuning import TileConfig
from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.table import Tiles

# Tokens up to which a call may do without a sort.
MOST_DIRECT_TOKENS = 4
# Of a call's kernels: the GEMMs, and all others.
PARTS = ("up", "down", "other")
# Triton compiles numbers that this divides for themselves.
_DIVISOR = 16


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

    @property
    def gemms(self) -> tuple:
        """What calls with equal GEMM problems have in common: N and K of both, and rows an expert."""
        experts, top_k, hidden, intermediate = self.sizes
        rows = Fraction(self.tokens * top_k, experts)
        few = self.tokens <= MOST_DIRECT_TOKENS
        return hidden, intermediate, rows, few, self.dtype, self.format, self.path

    def problem(self) -> Problem:
        """The op's view of it.

        Raises:
            ValueError: the op would refuse the call.
        """
        return describe_call(self.sizes, self.tokens, getattr(torch, self.dtype), self.form, self.path)

    def arguments(self) -> Arguments:
        """Its arguments, on tensors without memory."""
        return describe_arguments(self.sizes, self.tokens, getattr(torch, self.dtype), self.form, self.path)

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


def part_key(call: Call, tiles: Tiles, part: str) -> str:
    """What the compiled kernels of a part depend on: calls that have it in common share them.

    Args:
        call: the call.
        tiles: its tiles.
        part: one of `PARTS`.

    Returns:
        A key, as text.
    """
    experts, top_k, *reduction = call.sizes
    facts = [part, *reduction, top_k, call.dtype, call.format, call.path, tiles.variant]
    if part == "other":
        facts += [experts, call.tokens, tiles.up.block_m]
    else:
        routes = call.tokens * top_k
        facts += [routes == 1, routes % _DIVISOR == 0, asdict(getattr(tiles, part))]
    if tiles.variant == "direct":
        facts += [experts, call.tokens]
    form = call.form
    if form is not None and not form.multiplies_bytes:  # planes depend on both tiles, parts of K on the routes
        facts += [asdict(tiles.up), asdict(tiles.down), experts, call.tokens]
    return json.dumps(facts)
