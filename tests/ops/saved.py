"""Runs a saved program in a process that knows the op and nothing else:

    python -m tests.ops.saved export|aoti PROGRAM DATA

DATA holds a list of inputs, and afterwards the list of their results.
"""

import subprocess
import sys
from pathlib import Path

import torch

import moe_ops  # noqa: F401  (registers the op)


def run_saved(kind: str, program: Path, inputs: list[tuple]) -> list:
    """The results of the inputs, from a process of their own."""
    data = program.with_suffix(".data")
    torch.save(inputs, data)
    command = [sys.executable, "-m", "tests.ops.saved", kind, program, data]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(data)


def main(kind: str, program: str, data: str) -> None:
    """Runs the program."""
    loaded = torch.export.load(program).module() if kind == "export" else torch._inductor.aoti_load_package(program)
    with torch.no_grad():
        torch.save([loaded(*inputs) for inputs in torch.load(data)], data)


if __name__ == "__main__":
    main(*sys.argv[1:])
