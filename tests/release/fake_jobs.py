"""Jobs of benchmarks/in_turn.py that say when they are at work. They import nothing: their processes start fast."""

import os
import time
from pathlib import Path


def work(job: tuple[str, str], turn) -> tuple[str, int]:
    """Notes when it gets ready and when it has its turn; a job named so fails, or ends its process."""
    log, name = job
    note(log, f"{name} ready")
    if name == "fails":
        raise ValueError("as it should")
    turn()
    if name == "ends":
        os._exit(3)
    note(log, f"{name} begins")
    time.sleep(0.1)
    note(log, f"{name} ends")
    return name, os.getpid()


def note(log: str, text: str) -> None:
    """Adds a line, whole."""
    with Path(log).open("a") as stream:
        stream.write(text + "\n")
