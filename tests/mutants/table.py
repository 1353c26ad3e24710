"""Runs every mutant and writes the tables of docs/testing.md: `python -m tests.mutants.table`, some minutes.

What a Hopper GPU says of the mutants of its kernels is written where there is one, and kept elsewhere.
"""

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.mutants import emulators, kernels
from tests.mutants.hopper import HOPPER_MUTATIONS, RACES
from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS

DOCS = kernels.ROOT / "docs" / "testing.md"


def emulator_rows() -> Iterable[tuple[str, ...]]:
    """(mutant, what it breaks, kills per dtype) of the wrong emulators."""
    for wrong in emulators.WRONG:
        kills = emulators.kills(wrong)
        total = len(wrong.inputs) // len(emulators.DTYPES)
        counts = (sum(dtype == d for _, dtype in kills) for d in emulators.DTYPES)
        examples = ", ".join(dict.fromkeys(name for name, _ in kills))
        first = examples if len(examples) < 60 else examples[: examples.rindex(",", 0, 60)] + ", ..."
        yield (f"`{wrong.name}`", wrong.breaks, *(f"{count} of {total}" for count in counts), first)


def described(mutation: Mutation, outcome: str) -> tuple[str, ...]:
    """The row of a mutated kernel."""
    return f"`{mutation.name}`", f"`{mutation.file}.py`", mutation.breaks, outcome


def kernel_rows(mutations: Iterable[Mutation], *, interpret: bool) -> Iterable[tuple[str, ...]]:
    """(mutant, file, what it breaks, who killed it) of mutated kernels; on a GPU most of them wait for a deadline."""
    with tempfile.TemporaryDirectory() as folder, kernels.judges(2 if interpret else 6, interpret=interpret) as judge:
        futures = [(m, judge(Path(folder) / m.name, m, m.first)) for m in mutations]
        for mutation, future in futures:
            yield described(mutation, str(future.result()))


def replace_table(text: str, name: str, header: str, rows: Iterable[tuple[str, ...]]) -> str:
    """The text with another table between the marks of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    ruler = "| --- " * (header.count("|") - 1) + "|"
    lines = [header, ruler, *("| " + " | ".join(row) + " |" for row in rows)]
    return before + begin + "\n".join([*lines, end]) + after


def main() -> int:
    """Writes the tables; 1 if a mutant lives."""
    torch.set_num_threads(1)
    text = DOCS.read_text()
    header = "| mutant | what it breaks | fp32 | bf16 | fp16 | rejected by |"
    text = replace_table(text, "emulators", header, emulator_rows())
    header = "| mutant | file | what it breaks | killed by |"
    text = replace_table(text, "kernels", header, kernel_rows(MUTATIONS, interpret=True))
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        on_gpu = {row[0]: row[-1] for row in kernel_rows(HOPPER_MUTATIONS, interpret=False)}
    else:
        table = text.split("<!-- hopper: begin -->")[1].split("<!-- hopper: end -->")[0]
        on_gpu = dict(re.findall(r"^\| (`\w+`) .*\| ([^|]*) \|$", table, re.MULTILINE))
    on_gpu |= {f"`{mutation.name}`": "" for mutation in RACES}
    rows = ((*row, on_gpu.get(row[0], "not run")) for row in kernel_rows([*HOPPER_MUTATIONS, *RACES], interpret=True))
    text = replace_table(text, "hopper", "| mutant | file | what it breaks | killed by | on a GPU |", rows)
    DOCS.write_text(text)
    living = [line for line in text.splitlines() if ": lives |" in line or line.count("| 0 of") == 3]
    print("\n".join(living) or "no mutant lives")
    return bool(living)


if __name__ == "__main__":
    sys.exit(main())
