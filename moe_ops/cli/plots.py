"""A run's plots: latency and fraction of the limit over M, a PNG for each shape and routing."""

import importlib.util
from pathlib import Path

MISSING = "--plot needs matplotlib: pip install moe-ops-tma[bench]"

_OURS = ("tma", "classic", "heuristic", "tuned")


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
    return files


def describe_dtype(record: dict) -> str:
    """The dtype of a record, and its format if it has one."""
    return f"{record['dtype']}, {record['format']}" if "format" in record else record["dtype"]


def _figure(record: dict, what: str, cells: list[dict]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    latency, fraction = figure.subplots(1, 2)
    tokens = [cell["tokens"] for cell in cells]
    for label, style, milliseconds in _lines(cells):
        latency.plot(*_points(tokens, milliseconds), label=label, **style)
        reached = [ms and cell["limit_ms"] / ms for cell, ms in zip(cells, milliseconds, strict=True)]
        fraction.plot(*_points(tokens, reached), label=label, **style)
    latency.plot(tokens, [cell["limit_ms"] for cell in cells], color="black", linestyle=":", marker="_", label="limit")
    fraction.axhline(1.0, color="black", linestyle=":")
    latency.set(yscale="log", ylabel="milliseconds", title="Latency")
    fraction.set(ylim=(0, None), ylabel="limit / time", title="Fraction of the limit")
    for axes in (latency, fraction):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(count) for count in tokens], minor=False)
        axes.set_xlabel("M, tokens")
        axes.grid(alpha=0.3)
    latency.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # a decade may be all there is
    latency.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    latency.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = latency.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    versions = f"torch {record['torch']}, triton {record['triton']}"
    how = "eager calls" if record.get("mode") == "eager" else "CUDA graphs, cold L2"
    figure.suptitle(f"{what}, {describe_dtype(record)}, {how}\n{record['device']}, {versions}, {record['date']}")
    return figure


def _lines(cells: list[dict]) -> list[tuple[str, dict, list[float | None]]]:
    """(label, style, milliseconds of each cell): variants, ours the thickest, and the best recorded peer dashed."""
    names = dict.fromkeys(name for cell in cells for name in cell["ms"])
    lines = []
    for number, name in enumerate(names):
        style = {"color": f"C{number % 10}", "marker": "o", "markersize": 4, "linewidth": 2.4 if name in _OURS else 1.2}
        lines.append((name, style, [cell["ms"].get(name) for cell in cells]))
    recorded = [cell.get("recorded") or {} for cell in cells]
    if any(recorded):
        for label, key, color in (
            ("best peer (recorded)", "ms", "0.35"),
            ("best peer (recorded, scaled to this run)", "scaled_ms", "0.65"),
        ):
            style = {"color": color, "linestyle": "--", "marker": "x", "markersize": 4, "linewidth": 1.2}
            lines.append((label, style, [best.get(key) for best in recorded]))
    return lines


def _points(tokens: list[int], values: list[float | None]) -> tuple[list[int], list[float]]:
    """The points that were measured."""
    pairs = [(count, value) for count, value in zip(tokens, values, strict=True) if value is not None]
    return [count for count, _ in pairs], [value for _, value in pairs]
