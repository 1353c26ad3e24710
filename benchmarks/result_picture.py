"""The README's picture: latency over the number of tokens, beside every recorded peer, one panel a model."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

from result_tables import filled

from moe_ops.cli import plots
from moe_ops.cli.recorded import beside

# The colours of Okabe and Ito, which people who see fewer colours can tell apart; a family's second line is dashed.
_ORANGE, _SKY, _GREEN, _BLUE, _VERMILION, _PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
_FAMILIES = (
    ("vLLM", _BLUE, "s"),
    ("SGLang", _SKY, "^"),
    ("triton_kernels", _GREEN, "D"),
    ("DeepGEMM", _PURPLE, "v"),
    ("FlashInfer", "black", "P"),
    ("Unsloth", _ORANGE, "X"),
    ("FBGEMM", "#8C564B", "<"),
    ("SonicMoE", "#A89F00", "*"),
    ("torch", "0.55", "x"),
)
_TITLES = {
    "mixtral-8x7b": "Mixtral-8x7B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "deepseek-v3-tp8": "DeepSeek-V3, one rank of TP 8",
    "deepseek-v3-ep": "DeepSeek-V3, one rank of EP 8",
    "gpt-oss-20b": "gpt-oss-20B",
}
_MOST_FACTOR = 4.5
_COLORS = 128


def draw(ours: dict, peers: dict, file: str | Path) -> Path:
    """Writes the picture; returns its path."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(cell["shape"] for cell in ours["cells"]))
    styles = dict(_styles(peers))
    figure = Figure(figsize=(15, 11), layout="constrained")
    columns = 3
    grid = figure.add_gridspec(-(-(len(shapes) + 1) // columns), columns)
    for place, shape in enumerate(shapes):
        inner = grid[place // columns, place % columns].subgridspec(2, 1, height_ratios=(3, 2), hspace=0.03)
        latency, factor = figure.add_subplot(inner[0]), figure.add_subplot(inner[1])
        cells = sorted((cell for cell in ours["cells"] if cell["shape"] == shape), key=lambda cell: cell["tokens"])
        _panel(latency, factor, cells, {c["tokens"]: c["ms"] for c in peers["cells"] if c["shape"] == shape}, styles)
        latency.set_title(_TITLES.get(shape, shape), fontsize=14)
        if place % columns == 0:
            latency.set_ylabel("milliseconds", fontsize=12)
            factor.set_ylabel("time / ours", fontsize=12)
    legend = figure.add_subplot(grid[len(shapes) // columns, len(shapes) % columns])
    legend.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = f"The whole op: lower is better\n(time / ours is cut at {_MOST_FACTOR:g})"
    legend.legend(
        handles,
        labels,
        loc="upper left",
        fontsize=12.5,
        frameon=False,
        title=title,
        title_fontsize=13,
        alignment="left",
    )  # fmt: skip
    head = f"moe_ops: {ours['device']}, torch {ours['torch']}, triton {ours['triton']}, {plots.describe_dtype(ours)}"
    how = "CUDA graphs, cold L2, uniform routing"
    figure.suptitle(
        f"{head}, {ours['date']}; {how}\npeers: recorded on {peers['device']}, {peers['date']}", fontsize=13
    )
    _save(figure, Path(file))
    return Path(file)


def _save(figure, file: Path) -> None:
    """Writes a PNG of few colours, a quarter of the size: it is kept in the repository, and made anew at releases."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)


def _styles(peers: dict) -> Iterator[tuple[str, dict]]:
    seen: dict[str, int] = {}
    names = sorted({name for cell in peers["cells"] for name in cell["ms"]}, key=_rank)
    for name in names:
        family, color, marker = _FAMILIES[_rank(name)[0]]
        line = ("-", "--", ":")[min(seen.get(family, 0), 2)]
        seen[family] = seen.get(family, 0) + 1
        yield name, {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.3, "markersize": 5}


def _rank(name: str) -> tuple[int, str]:
    """Place of a peer's family, the last one for names of none."""
    place = next((i for i, (family, _, _) in enumerate(_FAMILIES) if name.startswith(family)), len(_FAMILIES) - 1)
    return place, name


def _panel(latency, factor, cells: list[dict], peers: dict[int, dict], styles: dict[str, dict]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    tokens = [cell["tokens"] for cell in cells]
    mine = {cell["tokens"]: cell["ms"]["tma"] for cell in cells}
    own = {"color": _VERMILION, "marker": "o", "linewidth": 3.2, "markersize": 7, "zorder": 5}
    latency.plot(tokens, [mine[count] for count in tokens], label="moe_ops", **own)
    for name, style in styles.items():
        points = [(count, peers[count][name]) for count in tokens if name in peers.get(count, ())]
        if points:
            latency.plot(*zip(*points, strict=True), label=name, **style)
            factor.plot([count for count, _ in points], [ms / mine[count] for count, ms in points], **style)
    limits = [cell["limit_ms"] for cell in cells]
    latency.plot(tokens, limits, color="black", linestyle=":", linewidth=1.5, label="limit: bytes or FLOPs")
    factor.axhline(1.0, color=_VERMILION, linewidth=3.2, zorder=1)
    factor.set_ylim(0.85, _MOST_FACTOR)
    for axes in (latency, factor):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(tokens))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    latency.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    factor.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4]))
    latency.xaxis.set_major_formatter(NullFormatter())
    factor.set_xticks(tokens, [f"{count // 1024}k" if count >= 1024 else str(count) for count in tokens])
    factor.set_xlabel("M, tokens", fontsize=12)


def caption(ours: dict, peers: dict) -> Iterator[str]:
    """The picture, and what it shows in words and in two numbers."""
    cells = [(cell, best) for cell in ours["cells"] if (best := beside(cell, peers))]
    factors = [best["ms"] / cell["ms"]["tma"] for cell, best in cells]
    mean = math.exp(sum(map(math.log, factors)) / len(factors))
    others = len({name for cell in peers["cells"] for name in cell["ms"]})
    yield "![Latency over the number of tokens, moe_ops and its peers](docs/images/latency-bf16.png)"
    yield ""
    what = f"{ours['device']}, torch {ours['torch']}, triton {ours['triton']}, {plots.describe_dtype(ours)}"
    who = f"{others} peers, recorded in a run of their own on an {peers['device']}, {peers['date']}"
    how = f"{mean:.2f} times as long, by the geometric mean over {len(factors)} cells"
    ahead = f"slower in {sum(factor > 1 for factor in factors)} of them"
    files = " and ".join(f"[{name}](benchmarks/results/{name})" for name in (ours["file"], peers["file"]))
    yield filled(
        f"{what}, {ours['date']}; {who}. The fastest of them takes {how}, and is {ahead}. Drawn by "
        f"`python benchmarks/report.py docs` from {files}."
    )
