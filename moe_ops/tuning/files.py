"""JSON files that may hold anything: bounded, strict, and never more than data."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

MAX_BYTES = 1 << 20
# Longer numbers than any that belongs here take Python quadratic time.
_MAX_DIGITS = 18
_SHOWN = 80


class ConfigError(ValueError):
    """A configuration file is not what it should be; the message names the file, the key, what it got and expected."""


def is_there(file: Path) -> bool:
    """Whether something of that name exists; what cannot be looked at is left to `read_json` to complain of."""
    try:
        return file.exists()
    except OSError:
        return True


def read_json(file: Path) -> object:
    """Reads a JSON file.

    Args:
        file: a regular file of at most 1 MiB, in UTF-8, without NaN, infinity, repeated keys or endless numbers.

    Returns:
        Its value.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        # Without O_NONBLOCK a pipe that somebody put there would never let go.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{file} is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES} bytes, expected a table of tiles, which is not")
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_refuse, parse_int=_integer, object_pairs_hook=_once_each
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not the JSON that is expected: {str(error)[:_SHOWN]}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in names if names.count(key) > 1)[:_SHOWN]!r} stands there twice")
    return value


class Fields:
    """An object of a file, key by key: every read checks, and what is never read does not belong there."""

    def __init__(self, file: Path, where: str, value: object) -> None:
        """Takes the value of `where` in `file` ("" for all of it)."""
        self._file, self._where = file, where
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {where or 'the file'} is {_show(value)}, expected an object")
        self._values, self._seen = value, set()

    def wrong(self, key: str, got: object, expected: str) -> ConfigError:
        """The error of a key."""
        return ConfigError(f"{self._file}: {self._path(key)} is {_show(got)}, expected {expected}")

    def take(self, key: str, expected: str, holds: Callable[[object], bool], default: object = ...) -> object:
        """The value of a key that `holds` accepts; the default where it is absent and has one."""
        self._seen.add(key)
        if key not in self._values:
            if default is not ...:
                return default
            raise ConfigError(f"{self._file}: {self._path(key)} is missing, expected {expected}")
        value = self._values[key]
        if not holds(value):
            raise self.wrong(key, value, expected)
        return value

    def object(self, key: str) -> "Fields":
        """An object inside this one."""
        return Fields(self._file, self._path(key), self.take(key, "an object", lambda value: isinstance(value, dict)))

    def invalid(self, key: str, error: ValueError) -> ConfigError:
        """The error of a key whose value another check refuses."""
        return ConfigError(f"{self._file}: {self._path(key)}: {error}")

    def integer(self, key: str, lowest: int, highest: int, default: object = ...) -> int:
        """An integer in a range; True and 1.0 are none."""

        def holds(value: object) -> bool:
            return type(value) is int and lowest <= value <= highest

        return self.take(key, f"an integer from {lowest} to {highest}", holds, default)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of several strings."""
        return self.take(key, f"one of {', '.join(allowed)}", lambda value: isinstance(value, str) and value in allowed)

    def text(self, key: str, default: object = ...) -> str:
        """A short string."""
        return self.take(
            key, "a string of at most 200 characters", lambda v: isinstance(v, str) and len(v) <= 200, default
        )

    def number(self, key: str) -> float | None:
        """A positive number, None where the key is absent."""

        def holds(value: object) -> bool:
            return type(value) in (int, float) and 0 < value < 1e9

        value = self.take(key, "a number above 0", holds, None)
        return None if value is None else float(value)

    def finish(self) -> None:
        """Raises ConfigError where a key is left that nothing has read."""
        for key in self._values:
            if key not in self._seen:
                known = ", ".join(sorted(self._seen))
                raise ConfigError(f"{self._file}: {self._path(key)} is not known, expected nothing but {known}")

    def _path(self, key: str) -> str:
        return f"{self._where}.{key[:_SHOWN]}" if self._where else key[:_SHOWN]


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def write_atomically(file: Path, text: str) -> None:
    """Writes a file whole or not at all: whoever reads it, whenever the writer dies, sees the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
