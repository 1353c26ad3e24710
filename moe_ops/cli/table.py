"""A run's lines of text: head, one row per cell, and below it stages and whatever went wrong."""

_SHAPE, _TIME = 22, 14
# What the heuristic may lack of tuned tiles, and what is noise between two runs of equal ones.
NEAR, _NOISE = 0.1, 0.02


def header(variants: list[str], *, recorded: bool) -> str:
    """The line above the rows."""
    times = " ".join(f"{name + ' ms':>{_width(name)}s}" for name in variants)
    columns = f"{'shape':{_SHAPE}s} {'routing':8s} {'M':>6s} {times}   limit ms  of limit  of padded"
    return columns + ("  recorded ms    scaled ms" if recorded else "")


def row(cell: dict, variants: list[str], *, recorded: bool) -> str:
    """A cell's line: times, and limits over the time of the fastest path of ours."""
    times = " ".join(_number(cell["ms"].get(name), f"{_width(name)}.4f") for name in variants)
    path = fastest_path(cell)
    fractions = [None, None]
    if path is not None:
        milliseconds = cell["ms"][path]
        fractions = [cell["limit_ms"] / milliseconds, cell["paths"][path]["padded_limit_ms"] / milliseconds]
    of_limit, of_padded = (_number(value, f"{width}.2f") for value, width in zip(fractions, (9, 10), strict=True))
    line = f"{cell['shape']:{_SHAPE}s} {cell['routing']:8s} {cell['tokens']:6d} {times}   {cell['limit_ms']:8.4f} "
    line += f"{of_limit} {of_padded}"
    if recorded:
        best = cell.get("recorded") or {}
        line += f" {_number(best.get('ms'), '12.4f')} {_number(best.get('scaled_ms'), '12.4f')}  {best.get('name', '')}"
    return line.rstrip()


def fastest_path(cell: dict) -> str | None:
    """The path of ours with the least time in a cell."""
    timed = {path: cell["ms"][path] for path in cell.get("paths", {}) if cell["ms"].get(path)}
    return min(timed, key=timed.get, default=None)


def stage_lines(cell: dict) -> list[str]:
    """A line for each path of ours whose stages were timed."""
    lines = []
    for path, facts in cell["paths"].items():
        if "stages" in facts:
            parts = [_stage(name, stage) for name, stage in facts["stages"].items() if isinstance(stage, dict)]
            ratio = _number(facts["stages"].get("op_over_stages"), ".2f")
            lines.append(f"    {path} ({facts['variant']}): {'; '.join(parts)}; op / stages {ratio}")
    return lines


def _stage(name: str, stage: dict) -> str:
    text = f"{name} {stage['us']:.1f} us"
    if "tflops" in stage:
        text += f" {stage['tflops']:.0f} TF/s {stage['of_cublas']:.2f} of cuBLAS"
        if "of_scaled_mm" in stage:
            text += f" {stage['of_scaled_mm']:.2f} of scaled_mm"
        text += f" {stage['of_limit']:.2f} of limit ({stage['bound']})"
    if "gbs" in stage:
        text += f" {stage['gbs']:.0f} GB/s {stage['of_stream']:.2f} of stream"
    return text


def differences(cells: list[dict]) -> str:
    """The largest difference of each variant's results from ours."""
    return f"largest rms difference from ours: {_largest(cells, 'differences', '.1e')}"


def tiles(cells: list[dict]) -> list[str]:
    """How far the tiles of the heuristic are from tuned ones; nothing where a run has not timed both."""
    pairs = [cell["ms"] for cell in cells if cell["ms"].get("heuristic") and cell["ms"].get("tuned")]
    if not pairs:
        return []
    ratios = sorted(ms["heuristic"] / ms["tuned"] for ms in pairs)
    near = sum(ratio <= 1 + NEAR for ratio in ratios)
    tables = sum(cell["paths"].get("tuned", {}).get("tiles") == "table" for cell in cells)
    worse = sum(slower(1 / ratio) for ratio in ratios)
    return [
        f"the heuristic's tiles take at most {NEAR:.0%} longer than tuned ones in {near} of {len(ratios)} cells "
        f"({near / len(ratios):.1%}), at the worst {max(ratios) - 1:.1%}; tuned ones are a table's in {tables}",
        f"tuned tiles take over {_NOISE:.0%} longer than the heuristic's in {worse} of {len(ratios)} cells, "
        f"at the worst {max(0.0, 1 / min(ratios) - 1):.1%}",
    ]


def slower(ratio: float) -> bool:
    """Whether a ratio of two times is more than noise."""
    return ratio > 1 + _NOISE


def oracle(cells: list[dict]) -> str:
    """The largest error of each variant's quantised results over that of the emulator."""
    return f"largest rms error over the emulator's: {_largest(cells, 'oracle', '.2f')}"


def _largest(cells: list[dict], key: str, form: str) -> str:
    largest = {}
    for cell in cells:
        for name, value in cell[key].items():
            largest[name] = max(value, largest.get(name, 0.0))
    return ", ".join(f"{name} {format(value, form)}" for name, value in largest.items())


def _width(name: str) -> int:
    return max(_TIME, len(name) + 3)


def _number(value: float | None, form: str) -> str:
    """A number, or a dash as wide."""
    if value is not None:
        return format(value, form)
    return "-".rjust(int(form.split(".")[0] or 1))
