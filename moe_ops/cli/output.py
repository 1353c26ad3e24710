"""Tables for people: by rich on a terminal where it is installed, plain text in a pipe."""

import sys
from collections.abc import Sequence


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table to stdout; a cell is shown by `str`, None as a dash."""
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    if sys.stdout.isatty() and (rich := _rich()) is not None:
        console, table_class, text_class = rich
        table = table_class(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in cells:
            table.add_row(*(text_class(value) for value in row))  # as it is: brackets are no markup
        console.print(table)
        return
    print(plain_table(title, columns, cells), flush=True)


def plain_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as aligned text."""
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [title] if title else []
    for row in (columns, *cells):
        lines.append("  ".join(f"{value:{width}s}" for value, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    rows = (columns, ["---"] * len(columns), *cells)
    return "\n".join(f"| {' | '.join(value.replace('|', chr(92) + '|') for value in row)} |" for row in rows)


def _rich():
    """(console, table class, text class), None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    return Console(), Table, Text
