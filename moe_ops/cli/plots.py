"""A run's plots: latency and fraction of the limit over M for each shape and routing, and what tuned tiles gain."""

import importlib.util
import math
from pathlib import Path

from moe_ops.cli.measure import OURS

MISSING = "--plot needs matplotlib: pip install moe-ops-tma[bench]"

# Okabe and Ito's colours, which all eyes tell apart (https://jfly.uni-koeln.de/color/), and a shape for each.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RECORDED = "best peer (recorded)"
# Percent at which the colours of gains end: what the heuristic is meant to stay within.
_MOST_GAIN = 10


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(record: dict, folder: str | Path) -> list[Path]:
    """Writes the plots of a record into a folder that exists; returns their paths."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["shape"], cell.get("routing", "uniform")), []).append(cell)
    files = []
    for (shape, routing), cells in groups.items():
        cells = sorted(cells, key=lambda cell: cell["tokens"])
        file = Path(folder) / f"bench-{shape}-{routing}.png"
        _figure(record, f"{shape}, {routing} routing", cells).savefig(file, dpi=100)
        files.append(file)
    if tiles := plot_tiles(record, Path(folder) / "bench-tiles.png"):
        files.append(tiles)
    return files


def plot_tiles(record: dict, file: Path) -> Path | None:
    """Writes a plot of what tuned tiles gain over the heuristic's; returns its path, None where a run has not both."""
    pairs = {
        (cell["shape"], cell["tokens"]): cell
        for cell in record["cells"]
        if cell.get("routing", "uniform") == "uniform" and cell["ms"].get("heuristic") and cell["ms"].get("tuned")
    }
    if not pairs:
        return None
    _tiles_figure(record, pairs).savefig(file, dpi=100)
    return file


def describe_dtype(record: dict) -> str:
    """The dtype of a record, and its format if it has one."""
    return f"{record['dtype']}, {record['format']}" if "format" in record else record["dtype"]


def _figure(record: dict, what: str, cells: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    latency, fraction = figure.subplots(1, 2)
    tokens = [cell["tokens"] for cell in cells]
    for label, style, milliseconds in _lines(cells):
        latency.plot(*_points(tokens, milliseconds), label=label, **style)
        if label == _RECORDED:  # of other ceilings
            continue
        reached = [ms and cell["limit_ms"] / ms for cell, ms in zip(cells, milliseconds, strict=True)]
        fraction.plot(*_points(tokens, reached), label=label, **style)
    latency.plot(tokens, [cell["limit_ms"] for cell in cells], color="black", linestyle=":", marker="_", label="limit")
    fraction.axhline(1.0, color="black", linestyle=":")
    latency.set(yscale="log", ylabel="milliseconds", title="Latency")
    fraction.set(ylim=(0, None), ylabel="limit / time", title="Roofline: how much of the time the limit explains")
    for count, cell in zip(tokens, cells, strict=True):
        fraction.annotate(
            cell["bound"], (count, 0.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color="0.35"
        )
    for axes in (latency, fraction):
        token_axis(axes, tokens)
        axes.grid(alpha=0.3)
    millisecond_axis(latency)
    handles, labels = latency.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    figure.suptitle(f"{what}, {_head(record)}")
    return figure


def _head(record: dict) -> str:
    how = "eager calls" if record.get("mode") == "eager" else "CUDA graphs, cold L2"
    versions = f"torch {record['torch']}, triton {record['triton']}"
    return f"{describe_dtype(record)}, {how}\n{record['device']}, {versions}, {record['date']}"


def token_axis(axes, tokens: list[int]) -> None:
    """Numbers of tokens, by their logarithm, with a tick for each that was measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens], minor=False)
    axes.set_xlabel("M, tokens")


def millisecond_axis(axes) -> None:
    """Milliseconds by their logarithm, as plain numbers; a decade may be all there is."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tiles_figure(record: dict, pairs: dict[tuple[str, int], dict]):
    """What tuned tiles gain over the heuristic's, for each shape and number of tokens."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(shape for shape, _ in pairs))
    tokens = sorted({count for _, count in pairs})
    figure = Figure(figsize=(4 + 0.9 * len(tokens), 2 + 0.33 * len(shapes)), layout="constrained")
    axes = figure.subplots()
    gains = [[math.nan] * len(tokens) for _ in shapes]
    for (shape, count), cell in pairs.items():
        row, column = shapes.index(shape), tokens.index(count)
        gain = 100 * (cell["ms"]["heuristic"] / cell["ms"]["tuned"] - 1)
        gains[row][column] = gain
        style = {"color": "white" if gain < _MOST_GAIN / 2 else "black", "fontsize": 8}
        if cell["paths"]["tuned"]["tiles"] == "table":
            style |= {"fontweight": "bold", "fontsize": 9}
        axes.text(column, row, f"{round(gain, 1) + 0.0:+.1f}", ha="center", va="center", **style)
    image = axes.imshow(gains, cmap="cividis", vmin=0, vmax=_MOST_GAIN, aspect="auto")
    axes.set_xticks(range(len(tokens)), [str(count) for count in tokens])
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_xlabel(
        "M, tokens. Bold: tiles of a table; elsewhere both times are of the heuristic's, and differ by noise"
    )
    figure.colorbar(image, label="% that the heuristic's tiles take longer", extend="max")
    figure.suptitle(f"The heuristic's tiles beside tuned ones, {_head(record)}", fontsize=10)
    return figure


def _lines(cells: list[dict]) -> list[tuple[str, dict, list[float | None]]]:
    """(label, style, milliseconds of each cell): variants, ours the thickest, and the best recorded peer dashed."""
    names = dict.fromkeys(name for cell in cells for name in cell["ms"])
    lines = []
    for number, name in enumerate(names):
        width = 2.4 if name in OURS else 1.2
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        lines.append((name, {**style, "linewidth": width}, [cell["ms"].get(name) for cell in cells]))
    recorded = [cell.get("recorded") or {} for cell in cells]
    if any(recorded):
        for label, key, color in (
            (_RECORDED, "ms", "0.35"),
            ("best peer (recorded, scaled to this run)", "scaled_ms", "0.65"),
        ):
            style = {"color": color, "linestyle": "--", "marker": "x", "markersize": 4, "linewidth": 1.2}
            lines.append((label, style, [best.get(key) for best in recorded]))
    return lines


def _points(tokens: list[int], values: list[float | None]) -> tuple[list[int], list[float]]:
    """The points that were measured."""
    pairs = [(count, value) for count, value in zip(tokens, values, strict=True) if value is not None]
    return [count for count, _ in pairs], [value for _, value in pairs]
