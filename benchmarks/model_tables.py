"""Tables of a whole model's tokens per second, in Markdown, from what benchmarks/end_to_end.py recorded."""

from collections.abc import Iterator

from result_tables import filled, table

OURS, ROUTERS = "moe_ops", "moe_ops + routers"
THEIRS = ("eager", "grouped_mm", "batched_mm")
IMPLEMENTATIONS = (*THEIRS, OURS, ROUTERS)
RUNS = {"as-is": "as it is", "compiled": "compiled, CUDA graph"}


def model_table(*records: dict) -> Iterator[str]:
    """Tokens per second, and where a compiled step's time goes; cells of later records replace earlier ones."""
    facts = (
        "{device}, torch {torch}, triton {triton}, transformers {transformers}, {date}, {dtype}; {layers} of 48 "
        "layers, {vocabulary} words, {context} tokens in the cache."
    )
    yield from dict.fromkeys(filled(facts.format(**record)) for record in records)
    cells = {
        (cell["workload"], cell["tokens"], cell["compiled"]): cell for record in records for cell in record["cells"]
    }
    cells = list(cells.values())
    yield "\nTokens per second.\n"
    columns = [*IMPLEMENTATIONS, "moe_ops / theirs", "+ routers / theirs"]
    yield from table(["workload", "run", *columns], map(_speeds, cells))
    if compiled := [cell for cell in cells if cell["compiled"]]:
        yield "\nWhere the time of a compiled step goes, in ms; *theirs* is transformers' fastest.\n"
        columns = ["theirs", "their blocks", "moe_ops", "its blocks", "+ routers", "its blocks", "outside", "blocks"]
        columns += ["blocks, + routers", "if blocks took no time"]
        yield from table(["workload", *columns], map(_shares, compiled))
    reasons = {(name, reason): None for cell in cells for name, reason in cell["left_out"].items()}
    yield from (f"\nA dash for {name}: {reason}." for name, reason in reasons)


def _speeds(cell: dict) -> list[str]:
    row = [_title(cell), RUNS["compiled" if cell["compiled"] else "as-is"]]
    row += [_number(cell["tokens"] * 1e3, cell["step"].get(name), ".0f") for name in IMPLEMENTATIONS]
    return row + [_number(_best(cell)[1], cell["step"].get(name), ".2f") for name in (OURS, ROUTERS)]


def _shares(cell: dict) -> list[str]:
    (name, step), blocks = _best(cell), cell["blocks"]
    row = [_title(cell), f"{step:.3f} {name}", f"{blocks[name]:.3f}"]
    for ours in (OURS, ROUTERS):
        row += [f"{cell['step'][ours]:.3f}", f"{blocks[ours]:.3f}"]
    outside = cell["step"][OURS] - blocks[OURS]
    row += [f"{outside:.3f}", *(f"{blocks[name] / blocks[ours]:.2f}x" for ours in (OURS, ROUTERS))]
    return [*row, f"{step / outside:.2f}x"]


def _best(cell: dict) -> tuple[str, float]:
    """The fastest implementation of transformers, and its milliseconds."""
    return min(((name, ms) for name, ms in cell["step"].items() if name in THEIRS), key=lambda pair: pair[1])


def _title(cell: dict) -> str:
    return f"{cell['workload']}, {'batch ' if cell['workload'] == 'decode' else ''}{cell['tokens']}"


def _number(numerator: float, milliseconds: float | None, form: str) -> str:
    return "-" if milliseconds is None else format(numerator / milliseconds, form)
