"""The heuristic's tiles beside tuned ones, for docs/tuning.md, in Markdown, from runs with both."""

import statistics
from collections.abc import Iterator

from result_tables import filled, head, table

from moe_ops.cli.calls import SHAPES
from moe_ops.cli.recorded import beside
from moe_ops.cli.table import NEAR, slower

# The heuristic was made from the shapes that `bench` has names of its own for.
_MADE_FROM = set(SHAPES.values())


def tiles_table(ours: dict, peers: dict | None = None) -> Iterator[str]:
    """The heuristic's time over that of tuned tiles in every cell, what that comes to, and the best recorded peers."""
    cells = [cell for cell in ours["cells"] if cell["ms"].get("heuristic") and cell["ms"].get("tuned")]
    yield from head(ours)
    yield from _ratios(cells)
    yield ""
    yield from _summary(cells)
    noise = [1 / _ratio(cell) for cell in cells if not _from_table(cell)]
    if noise:
        yield "\n" + filled(
            f"The noise: where tuned tiles are the heuristic's ({len(noise)} calls), so that the same kernels take "
            f"turns with themselves, their time over the heuristic's is {min(noise):.3f} to {max(noise):.3f}."
        )
    best = [(cell, beside(cell, peers) if peers else cell.get("recorded")) for cell in cells]
    if any(peer for _, peer in best):
        yield ""
        yield from _peers([(cell, peer) for cell, peer in best if peer])


def _ratio(cell: dict) -> float:
    return cell["ms"]["heuristic"] / cell["ms"]["tuned"]


def _from_table(cell: dict) -> bool:
    return cell["paths"].get("tuned", {}).get("tiles") == "table"


def _made_from(cell: dict) -> bool:
    return tuple(cell.get("sizes", ())) in _MADE_FROM


def _ratios(cells: list[dict]) -> Iterator[str]:
    """A row for each shape, a column for each number of tokens; those that the heuristic was made from come first."""
    tokens = sorted({cell["tokens"] for cell in cells})
    rows = {}
    for cell in sorted(cells, key=lambda cell: not _made_from(cell)):
        row = rows.setdefault(cell["shape"], {"made": "yes" if _made_from(cell) else "no"})
        row[cell["tokens"]] = f"{_ratio(cell):.3f}{'*' if _from_table(cell) else ''}"
    columns = ["heuristic / tuned at M =", "made from it", *tokens]
    yield from table(columns, [[name, row["made"], *(row.get(m, "-") for m in tokens)] for name, row in rows.items()])
    yield "\n*: tuned tiles are a table's. Without it they are the heuristic's."


def _summary(cells: list[dict]) -> Iterator[str]:
    """How near the heuristic is, and whether a table ever costs anything."""
    parts = {
        "all": cells,
        "that the heuristic was made from": [cell for cell in cells if _made_from(cell)],
        "others": [cell for cell in cells if not _made_from(cell)],
    }
    rows = []
    for name, part in parts.items():
        if not part:
            continue
        ratios = [_ratio(cell) for cell in part]
        near = sum(ratio <= 1 + NEAR for ratio in ratios)
        worst = max(part, key=_ratio)
        row = [name, len(part), f"{near} ({near / len(part):.1%})"]
        row += [f"{_ratio(worst) - 1:.1%}, {worst['shape']} at {worst['tokens']}"]
        row += [f"{statistics.geometric_mean(ratios):.3f}"]
        tuned = [1 / _ratio(cell) for cell in part if _from_table(cell)]
        rows.append([*row, len(tuned), sum(map(slower, tuned)), f"{max(tuned):.3f}" if tuned else "-"])
    columns = ["shapes", "calls", f"heuristic at most {NEAR:.0%} over tuned", "worst", "geometric mean"]
    yield from table([*columns, "a table's tiles", "of these slower, over 2%", "at most, tuned / heuristic"], rows)


def _peers(pairs: list[tuple[dict, dict]]) -> Iterator[str]:
    """A row for each call that a peer was recorded in."""
    rows, factors = [], {"heuristic": [], "tuned": []}
    for cell, best in pairs:
        times = [cell["ms"][name] for name in factors]
        for values, time in zip(factors.values(), times, strict=True):
            values.append(best["scaled_ms"] / time)
        row = [cell["shape"], cell["tokens"], *(f"{time:.4f}" for time in times), f"{_ratio(cell):.3f}"]
        row += ["table" if _from_table(cell) else "heuristic", f"{best['scaled_ms']:.4f} {best['name']}"]
        rows.append([*row, *(f"{values[-1]:.3f}" for values in factors.values())])
    columns = ["shape", "M", "heuristic ms", "tuned ms", "heuristic / tuned", "tuned tiles"]
    yield from table([*columns, "best recorded peer, scaled ms", "over heuristic", "over tuned"], rows)
    for name, values in factors.items():
        ahead = sum(value > 1 for value in values)
        mean = statistics.geometric_mean(values)
        yield f"\nThe peer over {name}, geometric mean: {mean:.3f}; ahead in {ahead} of {len(values)} cells."
