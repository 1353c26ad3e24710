"""A run of the benchmark for others to read: CSV, Markdown, and beside an earlier run."""

import csv
from pathlib import Path

from moe_ops.cli.output import markdown_table, plain_table
from moe_ops.cli.table import fastest_path, tiles
from moe_ops.tuning.files import ConfigError, read_json

_KEYS = ("device", "dtype", "cells")


def write_csv(record: dict, file: str | Path) -> None:
    """Writes a line for each cell and variant."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ("device", "dtype", "format", "shape", "routing", "tokens", "variant", "ms", "lowest_ms", "highest_ms",
             "limit_ms", "bound")
        )  # fmt: skip
        for cell in record["cells"]:
            for name, ms in cell["ms"].items():
                spread = cell["spread_ms"].get(name, (None, None))
                writer.writerow(
                    (record["device"], record["dtype"], record.get("format", "none"), cell["shape"], cell["routing"],
                     cell["tokens"], name, ms, *spread, cell["limit_ms"], cell["bound"])
                )  # fmt: skip


def write_markdown(record: dict, file: str | Path) -> None:
    """Writes a table with a row for each cell, below a line that says of what, and above what it comes to."""
    cells = record["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["ms"]))
    columns = ["shape", "routing", "M", *(f"{name} ms" for name in names), "limit ms", "bound"]
    rows = [
        [
            cell["shape"], cell["routing"], str(cell["tokens"]), *(_ms(cell["ms"].get(name)) for name in names),
            _ms(cell["limit_ms"]), cell["bound"],
        ]
        for cell in cells
    ]  # fmt: skip
    if {"heuristic", "tuned"} <= set(names):
        columns += ["heuristic / tuned", "tuned tiles"]
        for row, cell in zip(rows, cells, strict=True):
            row += [_ratio(cell["ms"].get("heuristic"), cell["ms"].get("tuned"))]
            row += [cell["paths"].get("tuned", {}).get("tiles", "-")]
    if any(cell.get("recorded") for cell in cells):
        columns += ["best recorded peer", "its ms, scaled", "scaled / ours"]
        for row, cell in zip(rows, cells, strict=True):
            best, path = cell.get("recorded") or {}, fastest_path(cell)
            row += [best.get("name", "-"), _ms(best.get("scaled_ms"))]
            row += [_ratio(best.get("scaled_ms"), path and cell["ms"][path])]
    form = f", {record['format']}" if "format" in record else ""
    versions = f"torch {record['torch']}, triton {record['triton']}, {record['date']}"
    text = [f"{record['device']}, {versions}, {record['dtype']}{form}.", markdown_table(columns, rows)]
    text += [f"{line[0].upper()}{line[1:]}." for line in tiles(cells)]
    Path(file).write_text("\n\n".join(text) + "\n", encoding="utf-8")


def load_record(file: str | Path) -> dict:
    """Reads what an earlier run wrote with --json.

    Raises:
        ValueError: the file is something else; the message says what.
    """
    record = read_json(Path(file))
    missing = [key for key in _KEYS if key not in record] if isinstance(record, dict) else list(_KEYS)
    if missing:
        raise ConfigError(f"{file} was not written by bench --json: it lacks {', '.join(missing)}")
    return record


def compare(before: dict, now: dict) -> str:
    """Times of two runs side by side, and the geometric mean of their ratios for each variant."""
    old = {_key(cell): cell["ms"] for cell in before["cells"]}
    rows, ratios = [], {}
    for cell in now["cells"]:
        for name, ms in cell["ms"].items():
            earlier = old.get(_key(cell), {}).get(name)
            if ms is None or earlier is None:
                continue
            ratios.setdefault(name, []).append(ms / earlier)
            row = [cell["shape"], cell["routing"], str(cell["tokens"]), name, _ms(earlier), _ms(ms)]
            rows.append([*row, f"{ms / earlier:.3f}"])
    if not rows:
        return "compared: the other run has none of these cells"
    title = f"compared with {before['device']}, {before['dtype']}, {before.get('date', 'no date')}"
    if before["device"] != now["device"]:
        title += f" (this run: {now['device']}; across devices a ratio says little of the code)"
    columns = ("shape", "routing", "M", "variant", "before ms", "now ms", "now / before")
    means = ", ".join(f"{name} {_geometric_mean(values):.3f}" for name, values in ratios.items())
    return f"{plain_table(title, columns, rows)}\ngeometric mean of now / before: {means}"


def _key(cell: dict) -> tuple:
    return cell["shape"], cell.get("routing", "uniform"), cell["tokens"]


def _geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.3f}" if value and other else "-"
