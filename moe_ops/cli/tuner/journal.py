"""What a run of the tuner found so far, line by line, so that the next one goes on where it was killed."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

_SCHEMA = 1


class Journal:
    """Results by key in a file of JSON lines, appended as they come.

    A line that was cut off, or that is none, is as if it had not been written. A journal of another head (device,
    versions) is begun anew: its times say nothing here.
    """

    def __init__(self, file: Path, head: Mapping[str, object]) -> None:
        """Reads what is there and opens the file for more.

        Args:
            file: where; its folder is made.
            head: what the results depend on beside their keys.
        """
        self._file = file
        self._results: dict[str, object] = {}
        first = {"schema": _SCHEMA, **head}
        lines = self._read()
        fresh = not lines or lines[0] != first
        if not fresh:
            for line in lines[1:]:
                if isinstance(line, dict) and isinstance(line.get("key"), str) and "value" in line:
                    self._results[line["key"]] = line["value"]
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(file, "w" if fresh else "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        # After a line that was cut off a new one begins here.
        self._append(first) if fresh else self._stream.write("\n")

    def __len__(self) -> int:
        """Results there are."""
        return len(self._results)

    def get(self, key: str) -> object | None:
        """A result, None if there is none."""
        return self._results.get(key)

    def put(self, key: str, value: object) -> None:
        """Keeps a result; it is on the disk when this returns."""
        self._results[key] = value
        self._append({"key": key, "value": value})

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def remove(self) -> None:
        """Closes and removes the file: everything that it led to is where it belongs."""
        self.close()
        self._file.unlink(missing_ok=True)

    def _append(self, value: object) -> None:
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _read(self) -> list[object]:
        lines: list[object] = []
        with contextlib.suppress(OSError), open(self._file, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                with contextlib.suppress(ValueError, RecursionError):
                    lines.append(json.loads(line))
        return lines
