"""Tables of docs/benchmarks.md, in Markdown, from recorded results. `benchmarks/report.py` prints them."""

import math
import textwrap
from collections.abc import Iterable, Iterator

from moe_ops.cli import plots
from moe_ops.cli.recorded import beside
from moe_ops.cli.table import fastest_path

Row = Iterable[object]


def peers_table(ours: dict, peers: dict) -> Iterator[str]:
    """The whole op by every variant, and the factors to the best recorded peer."""
    cells = [cell for cell in ours["cells"] if cell.get("routing", "uniform") == "uniform" and cell["ms"].get("tma")]
    variants = list(dict.fromkeys(name for cell in cells for name in cell["ms"]))
    rows, factors, scaled_factors, behind = [], [], [], []
    for cell in cells:
        time = cell["ms"]["tma"]
        row = [cell["shape"], cell["tokens"], *(number(cell["ms"].get(name), ".4f") for name in variants)]
        row += [number(cell.get("read_ms"), ".4f"), f"{cell['limit_ms'] / time:.2f}"]
        if best := beside(cell, peers):
            factors.append(best["ms"] / time)
            scaled_factors.append(best["scaled_ms"] / time)
            if scaled_factors[-1] <= 1:
                behind.append(f"{cell['shape']} at {cell['tokens']} ({scaled_factors[-1]:.3f})")
            row += [f"{best['ms']:.3f} {best['name']}", f"{factors[-1]:.3f}", f"{scaled_factors[-1]:.3f}"]
        else:
            row += ["-"] * 3
        rows.append(row)
    times = [f"{name} ms" for name in variants]
    yield from head(ours)
    yield from table(["shape", "M", *times, "read ms", "of limit", "best recorded peer", "factor", "scaled"], rows)
    for name, values in (("plain", factors), ("scaled", scaled_factors)):
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            ahead = sum(value > 1 for value in values)
            yield f"\nGeometric mean of the {name} factors: {mean:.3f}; ahead in {ahead} of {len(values)} cells."
    if behind:
        yield "\n" + filled(f"Behind, scaled: {', '.join(behind)}.")


def stages_table(ours: dict, only: str | None = None) -> Iterator[str]:
    """Each stage alone, of one path or of all, and the whole op over up + down + combine at the stream's rate."""
    gemm = {"us": ".1f", "tflops": ".0f", "of_cublas": ".2f", "of_limit": ".2f"}
    shown = {"route": {"us": ".1f"}, "up": gemm, "down": gemm, "combine": {"us": ".1f", "of_stream": ".2f"}}
    if any(cell.get("scaled_mm_tflops") for cell in ours["cells"]):  # in fp8 or int8
        gemm["of_scaled_mm"] = ".2f"
        shown = {"quantize": {"us": ".1f", "of_stream": ".2f"}, **shown}
    rows = []
    for cell in ours["cells"]:
        for path, facts in cell.get("paths", {}).items():
            if only in (None, path) and (stages := facts.get("stages")):
                row = [cell["shape"], cell["routing"], cell["tokens"], f"{path} {facts['variant']}"]
                for stage, forms in shown.items():
                    row += [number(stages.get(stage, {}).get(key), form) for key, form in forms.items()]
                rows.append([*row, number(stages.get("op_over_stages"), ".2f")])
    columns = [f"{stage} {key.replace('_', ' ')}" for stage, forms in shown.items() for key in forms]
    yield from head(ours)
    yield from table(["shape", "routing", "M", "path", *columns, "op over stages"], rows)


def skew_table(records: list[dict]) -> Iterator[str]:
    """Each routing beside the uniform one: time over limit, and how much of it the padding rows explain."""
    cells = [cell for record in records for cell in record["cells"] if fastest_path(cell)]
    uniform = {_key(cell): cell["ms"][fastest_path(cell)] for cell in cells if cell["routing"] == "uniform"}
    rows = []
    for cell in sorted(cells, key=_key):  # stable: the routings of a cell stay in their order
        path = fastest_path(cell)
        facts, time, limit = cell["paths"][path], cell["ms"][path], cell["limit_ms"]
        routes = cell["tokens"] * cell["sizes"][1]
        over_uniform = time / uniform[_key(cell)] if _key(cell) in uniform else None
        row = [cell["shape"], cell["tokens"], cell["routing"], cell["experts_met"], f"{path} {facts['variant']}"]
        row += [f"{time:.4f}", number(over_uniform, ".2f"), f"{facts['padded_rows'] / routes:.2f}"]
        row += [f"{time / limit:.2f}", f"{facts['padded_limit_ms'] / limit:.2f}"]
        rows.append([*row, f"{time / facts['padded_limit_ms']:.2f}"])
    columns = ["shape", "M", "routing", "experts met", "path", "ms", "over uniform", "padded rows / rows"]
    for record in records:
        yield from head(record)
    yield from table([*columns, "time / limit", "padding explains", "time / padded limit"], rows)


def eager_table(ours: dict) -> Iterator[str]:
    """Milliseconds of an eager call by every variant."""
    variants = list(dict.fromkeys(name for cell in ours["cells"] for name in cell["ms"]))
    rows = [[cell["shape"], *(number(cell["ms"].get(name), ".3f") for name in variants)] for cell in ours["cells"]]
    yield from head(ours)
    yield from table(["shape", *(f"{name} ms" for name in variants)], rows)


def weights_table(whole: dict, *records: dict) -> Iterator[str]:
    """Calls of quantised weights side by side, in the times of `path="tma"`, and the unquantised ones before them."""
    plain = {_key(cell): cell["ms"]["tma"] for cell in whole["cells"] if cell.get("routing", "uniform") == "uniform"}
    cells = [{_key(cell): cell for cell in record["cells"]} for record in records]
    rows = []
    for key in cells[0]:
        row = [*key, number(plain.get(key), ".4f")]
        for mine in cells:
            time = mine[key]["ms"]["tma"] if key in mine else None
            limit, read = (mine[key].get(name) if time else None for name in ("limit_ms", "read_ms"))
            # Where the FLOPs are the bound, a read of the bytes says nothing.
            read = read if time and mine[key].get("bound") == "bytes" else None
            row += [number(time, ".4f"), *(number(part and part / time, ".2f") for part in (limit, read))]
        rows.append(row)
    for record in records:
        yield head(record)[0]
    yield ""
    names = [record["format"].replace("_weights", "") for record in records]
    columns = [column for name in names for column in (f"{name} ms", "of limit", "of read")]
    yield from table(["shape", "M", "bf16 ms", *columns], rows)


def rows_table(record: dict) -> Iterator[str]:
    """The table of a benchmark that wrote columns and rows."""
    forms = {"us": ".0f", "topk_route us": ".2f", "torch us": ".2f", "aim": ".0f"}

    def shown(column: str, value: object) -> str:
        form = forms.get(column) or forms.get(column.rpartition(" ")[2]) or ".1f"
        return format(value, form) if isinstance(value, float) else str(value)

    yield from head(record)
    rows = [list(map(shown, record["columns"], row)) for row in record["rows"]]
    yield from table(record["columns"], rows)


def cpu_table(record: dict) -> Iterator[str]:
    """The op on a CPU beside the experts of transformers."""
    facts = record["environment"]
    sizes = ", ".join(f"{name} = {facts[name]}" for name in ("E", "top_k", "H", "I"))
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    where = f"{facts['cpu']} ({facts['capability']}), {facts['threads']} threads"
    yield filled(f"{where}, {versions}, {facts['date']}; {sizes}.")
    yield ""
    rows = [
        [row["dtype"], row["M"], *(f"{row[name]:.2f}" for name in ("moe_ops_ms", "eager_ms", "grouped_mm_ms"))]
        + [f"{row[name]:.2f}" for name in ("vs_eager", "vs_grouped_mm")]
        for row in record["rows"]
    ]
    columns = ["dtype", "M", "moe_ops ms", "eager ms", "grouped_mm ms", "eager / ours", "grouped_mm / ours"]
    yield from table(columns, rows)


def proof_lines(record: dict) -> Iterator[str]:
    """What the tests on a GPU gave."""
    counts = ", ".join(f"{number} {name}" for name, number in record["counts"].items())
    end = "to the last one" if record["finished"] else "as far as the time went"
    yield filled(f"{head(record)[0]} {counts}, in {record['seconds']} s, {end}.")


def demo_lines(record: dict) -> Iterator[str]:
    """What an example printed."""
    yield f"`python {' '.join(record['example'])}`, {record['seconds']:.0f} s: {head(record)[0]}"
    yield from ("", "```text", *record["printed"], "```")


def _key(cell: dict) -> tuple[str, int]:
    return cell["shape"], cell["tokens"]


def head(record: dict) -> list[str]:
    """Where and with what a record was made."""
    facts = [record["device"], f"torch {record['torch']}", f"triton {record['triton']}", record["date"]]
    return [", ".join([*facts, *([plots.describe_dtype(record)] if "dtype" in record else [])]) + ".", ""]


def filled(text: str) -> str:
    """A paragraph in lines of the docs' length, never broken inside a word or before a unit's bracket."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def table(columns: list[str], rows: Iterable[Row]) -> Iterator[str]:
    """A Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def number(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)
