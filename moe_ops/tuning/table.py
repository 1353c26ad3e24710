"""Tables of tuned tiles: a JSON file for each bucket, with an entry for each number of tokens that was tuned."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from moe_ops.tuning.bucket import DTYPES, FORMATS, PATHS, Bucket
from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.files import ConfigError, Fields, read_json
from moe_ops.tuning.variants import VARIANTS

SCHEMA = 1
# Numbers of tokens further apart than this factor say nothing of each other.
_REACH = 2
_MAX_ENTRIES = 256
_MAX_SIZE = 1 << 24
_MADE = ("moe_ops", "torch", "triton", "date")


@dataclass(frozen=True)
class Tiles:
    """How the GEMMs of a call run.

    Attributes:
        variant: as `Plan.variant`.
        up: tile of the up GEMM.
        down: tile of the down GEMM.
    """

    variant: str
    up: TileConfig
    down: TileConfig


@dataclass(frozen=True)
class Entry:
    """What was found for a number of tokens.

    Attributes:
        tokens: M.
        tiles: the best ones; None where those of the heuristic are.
        ms: milliseconds of a call with them, None where nobody wrote that down.
        heuristic_ms: the same with the heuristic's, in the same rounds.
    """

    tokens: int
    tiles: Tiles | None = None
    ms: float | None = None
    heuristic_ms: float | None = None


@dataclass(frozen=True)
class Table:
    """The entries of a bucket on a device.

    Attributes:
        bucket: what they are for.
        device: name of the device they were measured on.
        entries: by ascending numbers of tokens.
        made: versions and date, by "moe_ops", "torch", "triton" and "date".
        foreign: read from a file of another library, which knows nothing of variants.
    """

    bucket: Bucket
    device: str
    entries: tuple[Entry, ...]
    made: dict[str, str] = field(default_factory=dict)
    foreign: bool = False

    def near(self, tokens: int) -> Entry | None:
        """The entry whose number of tokens is nearest, as a ratio; None if that is more than 2 either way.

        In comparisons of integers alone, so that launches compiled ahead of time can have the number as a symbol.
        """
        below = above = None
        for entry in self.entries:
            if entry.tokens <= tokens:
                below = entry
            elif above is None:
                above = entry
        if below is not None and _REACH * below.tokens < tokens:
            below = None
        if above is not None and above.tokens > _REACH * tokens:
            above = None
        if below is None or above is None:
            return below or above
        return below if tokens * tokens <= below.tokens * above.tokens else above

    def merged(self, newer: "Table") -> "Table":
        """This table with the entries of a newer one in the place of its own."""
        entries = {entry.tokens: entry for entry in (*self.entries, *newer.entries)}
        return Table(newer.bucket, newer.device, tuple(entries[tokens] for tokens in sorted(entries)), newer.made)


def load_table(file: Path, bucket: Bucket | None = None) -> Table:
    """Reads a table.

    Args:
        file: where it is.
        bucket: what it should be for, where that is known.

    Returns:
        The table.

    Raises:
        ConfigError: the file is broken, of another schema, or for something else; the message says where.
    """
    top = Fields(file, "", read_json(file))
    top.integer("schema", SCHEMA, SCHEMA)
    sizes = [top.integer(name, 1, _MAX_SIZE) for name in ("experts", "hidden", "intermediate", "top_k")]
    found = Bucket(*sizes, top.choice("dtype", DTYPES), top.choice("format", FORMATS), top.choice("path", PATHS))
    device = top.text("device")
    made = Fields(file, "made", top.take("made", "an object", lambda value: isinstance(value, dict), {}))
    versions = {name: value for name in _MADE if (value := made.text(name, None)) is not None}
    made.finish()
    listed = top.take("entries", f"a list of at most {_MAX_ENTRIES} objects", _is_list)
    top.finish()
    entries = [_entry(Fields(file, f"entries[{number}]", value)) for number, value in enumerate(listed)]
    tokens = [entry.tokens for entry in entries]
    if tokens != sorted(set(tokens)):
        raise ConfigError(f"{file}: entries have tokens {tokens}, expected ascending ones")
    if bucket is not None:
        for name, got, expected in zip(Bucket.__dataclass_fields__, asdict(found).values(), asdict(bucket).values(),
                                       strict=True):  # fmt: skip
            if got != expected:
                raise top.wrong(name, got, f"{expected!r}, as the file's name says")
    return Table(found, device, tuple(entries), versions)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ENTRIES


def _entry(values: Fields) -> Entry:
    tokens, ms, heuristic_ms = (
        values.integer("tokens", 1, _MAX_SIZE),
        values.number("ms"),
        values.number("heuristic_ms"),
    )
    tiles = None
    if values.take("variant", "a variant", lambda value: True, None) is not None:
        variant = values.choice("variant", VARIANTS)
        tiles = Tiles(variant, *(_tile(values, name) for name in ("up", "down")))
    values.finish()
    return Entry(tokens, tiles, ms, heuristic_ms)


def _tile(entry: Fields, name: str) -> TileConfig:
    values = entry.object(name)
    blocks = [values.integer(block, 1, 2048) for block in ("block_m", "block_n", "block_k")]
    numbers = [values.integer(*limits) for limits in (("group_m", 1, 256), ("num_warps", 1, 16), ("num_stages", 1, 8))]
    swap_ab = values.take("swap_ab", "true or false", lambda value: isinstance(value, bool), False)
    values.finish()
    try:
        return TileConfig(*blocks, *numbers, swap_ab)
    except ValueError as error:
        raise entry.invalid(name, error) from error


def dump_table(table: Table) -> str:
    """The text of a table's file; `load_table` reads it."""
    value = {"schema": SCHEMA, **asdict(table.bucket), "device": table.device, "made": table.made}
    lines = [json.dumps(_without_none(entry)) for entry in table.entries]
    head = json.dumps(value, indent=1)[:-2]
    body = ",\n  ".join(lines)
    return f'{head},\n "entries": [\n  {body}\n ]\n}}\n' if lines else f'{head},\n "entries": []\n}}\n'


def _without_none(entry: Entry) -> dict[str, object]:
    value: dict[str, object] = {"tokens": entry.tokens}
    if entry.tiles is not None:
        value |= {"variant": entry.tiles.variant} | {
            name: {f.name: getattr(getattr(entry.tiles, name), f.name) for f in fields(TileConfig)}
            for name in ("up", "down")
        }
    for name in ("ms", "heuristic_ms"):
        if getattr(entry, name) is not None:
            value[name] = round(getattr(entry, name), 6)
    return value
