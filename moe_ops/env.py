"""The environment variables `MOE_OPS_*`: every one of them is read here and nowhere else."""

import logging
import os

LOGGER = logging.getLogger("moe_ops")
LOGGER.addHandler(logging.NullHandler())

_TRUE, _FALSE = ("1", "true", "on", "yes"), ("", "0", "false", "off", "no")


def flag(name: str) -> bool:
    """Reads a switch: 1, true, on, yes / 0, false, off, no, or unset (off); case and blanks around do not matter.

    Raises:
        ValueError: the variable holds something else.
    """
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name} is {value[:40]!r}, expected one of {', '.join(_TRUE + _FALSE[1:])}, or unset")


def batch_invariant() -> bool:
    """`MOE_OPS_BATCH_INVARIANT`: tile sizes do not depend on the number of tokens (default off)."""
    return flag("MOE_OPS_BATCH_INVARIANT")


def config_dir() -> str | None:
    """`MOE_OPS_CONFIG_DIR`: a folder of tables of tuned tiles, looked into before the package's own (default: none).

    Tables are read when the first call of their kind is planned, and kept: a later change of the variable or of a file
    is seen by the next process.
    """
    return os.environ.get("MOE_OPS_CONFIG_DIR", "").strip() or None


def set_log_level() -> None:
    """`MOE_OPS_LOGLEVEL`: level of the logger "moe_ops" (default: as the application's logging says).

    Raises:
        ValueError: the variable holds something that is not a level of `logging`.
    """
    level = os.environ.get("MOE_OPS_LOGLEVEL", "").strip().upper()
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if level and level not in levels:
        raise ValueError(f"MOE_OPS_LOGLEVEL is {level[:40]!r}, expected one of {', '.join(levels)}, or unset")
    if level:
        LOGGER.setLevel(level)
