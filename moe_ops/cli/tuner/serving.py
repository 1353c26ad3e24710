"""The worker's side of the pool: requests in, events out, whatever the work does to the process."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

Send = Callable[[dict], None]


class Engine(Protocol):
    """What does the work of a worker."""

    def hello(self) -> dict:
        """What it says of itself when it is ready."""

    def broken(self) -> bool:
        """Whether the process can do no more work, asked after a failure."""

    def answer(self, request: Mapping, send: Send) -> object:
        """Does what a request asks for; returns its result."""


def serve(connection, log: str | None, start: Callable[[], Engine]) -> None:
    """Answers requests until the other end is closed, or the engine is broken; see `pool.Pool` for what it says.

    Args:
        connection: to the pool.
        log: file for what compilers and drivers print; None for nowhere.
        start: makes the engine.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    _redirect(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: dict) -> None:
        connection.send_bytes(json.dumps(event).encode())

    engine = start()
    send({"event": "ready", **engine.hello()})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            send({"event": "done", "result": engine.answer(request, send)})
        except Exception as error:  # of compilers and drivers: any
            broken = engine.broken()
            send({"event": "failed", "error": one_line(error), "broken": broken})
            if broken:
                return


def one_line(error: BaseException) -> str:
    """An error's kind and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _redirect(log: str | None) -> None:
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)


def _end_with_parent() -> None:
    """A kernel that hangs lets no exception through: where the parent is killed, nobody else would end this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
