"""What a result has beside its numbers: device, versions, date. For the benchmarks in this folder."""

import datetime
import json
import platform
from pathlib import Path

import torch

import moe_ops


def head(**facts: object) -> dict[str, object]:
    """The facts of this machine that every record begins with, and the given ones."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moe_ops": moe_ops.__version__,
        "date": datetime.date.today().isoformat(),
        **facts,
    }


def write(file: str | None, record: dict[str, object]) -> None:
    """Writes a record, if there is a file for it."""
    if file:
        Path(file).write_text(json.dumps(record, indent=1) + "\n")
