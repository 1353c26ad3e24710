"""What a run of the tuner gained: lines of text and a plot."""

from collections.abc import Sequence
from pathlib import Path

from moe_ops.cli.explain import describe_tile
from moe_ops.cli.plots import COLORS, millisecond_axis, token_axis
from moe_ops.cli.tuner.calls import tiles_to_json
from moe_ops.cli.tuner.search import Found
from moe_ops.tuning.table import Table

COLUMNS = ("M", "heuristic ms", "tuned ms", "gain", "variant", "up", "down", "tried", "failed")


def gain(found: Found) -> float | None:
    """How much faster the entry's tiles are than the heuristic's: 0.1 for 10 %; None without an entry."""
    entry = found.entry
    return None if entry is None else entry.heuristic_ms / entry.ms - 1


def row(found: Found) -> tuple[object, ...]:
    """A line of the table of a bucket."""
    entry = found.entry
    if entry is None:
        return found.call.tokens, None, None, None, found.error, None, None, found.candidates, len(found.failed)
    tiles = entry.tiles
    kept = ("as the heuristic", None, None)
    chosen = (tiles.variant, describe_tile(tiles.up), describe_tile(tiles.down)) if tiles else kept
    times = f"{entry.heuristic_ms:.4f}", f"{entry.ms:.4f}", f"{gain(found):+.1%}"
    return found.call.tokens, *times, *chosen, found.candidates, len(found.failed)


def summary(founds: Sequence[Found]) -> str:
    """The gain over all calls of a bucket, in words."""
    gains = [value for found in founds if (value := gain(found)) is not None]
    if not gains:
        return "nothing was found"
    product = 1.0
    for value in gains:
        product *= (1 + value) ** (1 / len(gains))
    better = sum(value > 0 for value in gains)
    return f"{better} of {len(gains)} calls gain over the heuristic; {product - 1:.1%} by the geometric mean of all"


def to_json(found: Found) -> dict[str, object]:
    """Everything about a call, for --json."""
    entry = found.entry
    return {
        "tokens": found.call.tokens,
        "ms": entry and entry.ms,
        "heuristic_ms": entry and entry.heuristic_ms,
        "tiles": tiles_to_json(entry.tiles) if entry and entry.tiles else None,
        "candidates": found.candidates,
        "failed": found.failed,
        "error": found.error,
        "timed": [{**tiles_to_json(tiles), "ms": ms} for tiles, ms in found.timed],
    }


def plot(name: str, table: Table, file: Path) -> None:
    """A PNG of a table: milliseconds of both over the number of tokens, and what was gained."""
    from matplotlib.figure import Figure

    entries = [entry for entry in table.entries if entry.ms and entry.heuristic_ms]
    tokens = [entry.tokens for entry in entries]
    figure = Figure(figsize=(13, 5), layout="constrained")
    latency, gained = figure.subplots(1, 2)
    # One inside the other where they are equal, as they mostly are.
    own = {"color": COLORS[1], "marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "--"}
    latency.plot(tokens, [entry.heuristic_ms for entry in entries], label="heuristic", **own)
    latency.plot(tokens, [entry.ms for entry in entries], "o-", color=COLORS[0], markersize=5, label="tuned")
    latency.set(yscale="log", ylabel="milliseconds", title="Latency, CUDA graphs, cold L2")
    token_axis(latency, tokens)
    millisecond_axis(latency)
    latency.legend(loc="upper left")
    gains = [100 * (entry.heuristic_ms / entry.ms - 1) for entry in entries]
    bars = gained.bar(range(len(entries)), gains, color=COLORS[0])
    kept = [
        "heuristic\nkept" if entry.tiles is None else f"{gain:.1f} %"
        for entry, gain in zip(entries, gains, strict=True)
    ]
    gained.bar_label(bars, kept, padding=3, fontsize=9)
    gained.set(ylabel="% longer with the heuristic's tiles", title="Gain over the heuristic", xlabel="M, tokens")
    gained.set_ylim(0, max([5.0, *gains]) * 1.15)
    gained.set_xticks(range(len(entries)), [str(count) for count in tokens])
    for axes in (latency, gained):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    bucket, made = table.bucket, table.made
    form = "" if bucket.format == "none" else f", {bucket.format}"
    versions = f"torch {made.get('torch')}, triton {made.get('triton')}, {made.get('date')}"
    figure.suptitle(f"{name}, {bucket.dtype}{form}, path {bucket.path}\n{table.device}, {versions}")
    figure.savefig(file, dpi=100)
