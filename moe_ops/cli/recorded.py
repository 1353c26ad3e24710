"""Peers measured in another run, whose clocks were not ours: read from JSON, and scaled to a cell's ceilings."""

import json
from pathlib import Path

from moe_ops.cli.calls import SHAPES

KEYS = ("dtype", "cublas_tflops", "stream_gbs", "cells")


def load_peers(file: str | Path) -> dict:
    """Reads recorded peers.

    Raises:
        ValueError: the file cannot be read or holds something else; the message says which.
    """
    try:
        peers = json.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    missing = [key for key in KEYS if key not in peers] if isinstance(peers, dict) else KEYS
    if missing:
        raise ValueError(f"{file} is not a record of peers: it lacks {', '.join(missing)}")
    if not isinstance(peers["cublas_tflops"], dict):
        raise ValueError(f"{file} is not a record of peers: its cublas_tflops are not rates by name")
    return peers


def check_recorded(peers: dict, file: str | Path, dtype: str, form: str) -> None:
    """Checks that recorded peers can stand beside a run.

    Args:
        peers: what `load_peers` gave.
        file: where from.
        dtype: of the run.
        form: the run's format, "none" without.

    Raises:
        ValueError: they are of another dtype or format.
    """
    if peers["dtype"] != dtype:
        raise ValueError(f"{file} holds times in {peers['dtype']}, not {dtype}")
    forms = peers.get("formats", ["none"])
    if form not in forms:
        raise ValueError(f"{file} holds times of the format {' or '.join(forms)}, not {form}")


def best_recorded(peers: dict) -> dict[tuple[str, int], tuple[float, str]]:
    """(shape, tokens) -> (milliseconds, name) of the fastest recorded peer."""
    return {
        (cell["shape"], cell["tokens"]): min((ms, name) for name, ms in cell["ms"].items()) for cell in peers["cells"]
    }


def scale(cell: dict, peers: dict) -> float:
    """The peers' ceilings over those of a cell: a factor for their times.

    The read-only stream counts where the cell is bound by bytes, the cuBLAS product where it is bound by FLOPs.
    """
    if cell["bound"] == "bytes":
        return peers["stream_gbs"] / cell["stream_gbs"]
    # Power limits a card that multiplies without a pause; the peers' run has one rate for either state.
    rates = peers["cublas_tflops"]
    near = min(rates.values(), key=lambda rate: abs(rate - cell["cublas_tflops"]))
    return near / cell["cublas_tflops"]


def beside(cell: dict, peers: dict) -> dict | None:
    """The best recorded peer of a cell, as measured and scaled; None where there is none, or not for its routing."""
    # The same sizes go by several names: "deepseek-v3-ep", and "deepseek-v3-ep8" of `--model deepseek-v3:ep8`.
    sizes = tuple(cell.get("sizes", ()))
    names = [cell["shape"], *(name for name, known in SHAPES.items() if known == sizes)]
    recorded = best_recorded(peers)
    best = next((recorded[name, cell["tokens"]] for name in names if (name, cell["tokens"]) in recorded), None)
    if best is None or cell.get("routing", "uniform") != "uniform":
        return None
    milliseconds, name = best
    return {"name": name, "ms": milliseconds, "scaled_ms": milliseconds * scale(cell, peers)}
