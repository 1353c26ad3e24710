"""Which tuned tiles a call gets: found once for each bucket of a process, and kept."""

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path

from moe_ops import env
from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.tuning.bucket import Bucket, architecture_folder, bucket_of, device_folder
from moe_ops.tuning.files import ConfigError, is_there
from moe_ops.tuning.foreign import foreign_names, load_foreign
from moe_ops.tuning.heuristics import tile_configs
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import Table, Tiles, load_table
from moe_ops.tuning.variants import choose_variant

PACKAGED = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Tuned(Tiles):
    """Tiles out of a file.

    Attributes:
        source: the file's name, and the number of tokens of the entry.
    """

    source: str = ""


def tuned_tiles(problem: Problem, device: Device, path: str) -> Tuned | None:
    """The tiles that a table has for a call; None where the heuristic is to choose.

    An entry for another number of tokens, at most a factor of 2 away, stands in where the heuristic would choose the
    same tiles for both: then the call is of the kind that was measured.

    Args:
        problem: the call.
        device: where it runs.
        path: "tma" or "classic".

    Returns:
        Variant and tiles, which fit the device; an entry that does not is one warning.
    """
    if device.kind != "cuda" or device.interpreted or problem.num_tokens < 1:
        return None
    bucket = bucket_of(problem, path)
    if bucket is None:
        return None
    found = _table(bucket, device.name, device.capability, env.config_dir())
    entry = None if found is None else found[0].near(problem.num_tokens)
    if entry is None or entry.tiles is None:
        return None
    table, name = found
    own = heuristic_tiles(problem, device, path)
    tuned = entry.tiles
    if entry.tokens != problem.num_tokens:
        elsewhere = replace(problem, num_tokens=entry.tokens)
        if heuristic_tiles(elsewhere, device, path) != own:
            return None
    if table.foreign and own.variant != "sorted":  # those who made it had no other kernel to compare with
        return None
    obstacle = tuned_obstacle(problem, device, path, tuned.variant, tuned.up, tuned.down)
    if obstacle is not None:
        _warn(f"{name}: the entry for {entry.tokens} tokens is left out: {obstacle}")
        return None
    return Tuned(tuned.variant, tuned.up, tuned.down, f"{name}, tokens {entry.tokens}")


def heuristic_tiles(problem: Problem, device: Device, path: str) -> Tiles:
    """What a call gets without a table."""
    variant = choose_variant(problem, device, path, batch_invariant=False)
    up, down = tile_configs(problem, device, path, variant, batch_invariant=False)
    return Tiles(variant, up, down)


def folders(device: str, capability: tuple[int, int] | None, config_dir: str | None) -> list[Path]:
    """Where a device's tables are looked for, the first one wins: `MOE_OPS_CONFIG_DIR` before the package's own."""
    roots = [PACKAGED] if config_dir is None else [Path(config_dir), PACKAGED]
    names = [device_folder(device)] + ([] if capability is None else [architecture_folder(capability)])
    return [root / name for root in roots for name in names]


@functools.lru_cache(maxsize=4096)
def _table(
    bucket: Bucket, device: str, capability: tuple[int, int] | None, config_dir: str | None
) -> tuple[Table, str] | None:
    """A bucket's table and the name of its file. Says what is wrong with a file, or that there is none, once."""
    broken = False
    for folder in folders(device, capability, config_dir):
        file = folder / bucket.file_name
        if is_there(file):
            try:
                return load_table(file, bucket), str(file)
            except ConfigError as error:
                _warn(f"a table of tiles is left out: {error}")
                broken = True
    if config_dir is not None:
        for file in _foreign_files(bucket, device, Path(config_dir)):
            try:
                return load_foreign(file, bucket, device), str(file)
            except ConfigError as error:
                _warn(f"a file of tiles is left out: {error}")
                broken = True
    if not broken:
        env.LOGGER.info("no tuned tiles for these experts on %s; to make them: %s", device, bucket.tune_command)
    return None


def _foreign_files(bucket: Bucket, device: str, root: Path) -> list[Path]:
    """Files of vLLM and SGLang in a folder, or in its `triton_*` folders, the newest of those first."""
    places = [root, root / device_folder(device)]
    with contextlib.suppress(OSError):
        places += sorted(root.glob("triton_*"), key=_version_of, reverse=True)
    return [file for place in places for name in foreign_names(bucket, device) if is_there(file := place / name)]


def _version_of(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("_")[1:] if part.isdecimal())


_warned: set[str] = set()
_MAX_WARNINGS = 1000


def _warn(message: str) -> None:
    """Logs a warning once."""
    if message not in _warned and len(_warned) < _MAX_WARNINGS:
        _warned.add(message)
        env.LOGGER.warning(message)


def forget() -> None:
    """Forgets what was read, for tests and tools: files are read again by the next plan."""
    _table.cache_clear()
    _warned.clear()
