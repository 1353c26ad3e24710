"""Tile files of vLLM and SGLang, read for the classic path, whose kernel is of the same kind.

    theirs         ours
    BLOCK_SIZE_M   block_m of both GEMMs
    BLOCK_SIZE_N   down.block_n; half of it for up.block_n, which counts gate and up columns together
    BLOCK_SIZE_K   block_k
    GROUP_SIZE_M   group_m
    num_warps      num_warps
    num_stages     num_stages

SGLang's second file, whose name ends in `_down`, gives the down GEMM its own tile but for block_m. What else a file may
say (`USE_TMA`, `SPLIT_K`, `waves_per_eu`, `matrix_instr_nonkdim`, `kpack`) is about other kernels and does nothing.

Source: `get_config_file_name` and `get_moe_configs` of vLLM's fused_moe.py and of SGLang's fused_moe_triton_config.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.files import ConfigError, Fields, is_there, read_json
from moe_ops.tuning.table import Entry, Table, Tiles

_IGNORED = ("USE_TMA", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "SPLIT_K")
# Bucket.format -> what their names say of it; formats that are not here have no file there.
_SUFFIXES = {
    "none": ("",),
    "fp8_tensor": (",dtype=fp8_w8a8",),
    "fp8_tensor_static": (",dtype=fp8_w8a8",),
    "fp8_channel": (",dtype=fp8_w8a8,per_channel_quant=True", ",dtype=fp8_w8a8"),
    "fp8_block": (",dtype=fp8_w8a8,block_shape=[128,128]", ",dtype=fp8_w8a8,block_shape=[128, 128]"),
    "int8_channel": (",dtype=int8_w8a8,per_channel_quant=True", ",dtype=int8_w8a8"),
    "int8_block": (",dtype=int8_w8a8,block_shape=[128,128]", ",dtype=int8_w8a8,block_shape=[128, 128]"),
    "int8_weights": (",dtype=int8_w8a16",),
    "int4": (",dtype=int4_w4a16",),
    "int4_g64": (",dtype=int4_w4a16",),
    "int4_g32": (",dtype=int4_w4a16",),
}
_MAX_TOKENS = 1 << 24


def foreign_names(bucket: Bucket, device: str) -> Iterator[str]:
    """The names that vLLM and SGLang give the file of a bucket on a device."""
    if bucket.path != "classic":
        return
    for suffix in _SUFFIXES.get(bucket.format, ()):
        yield f"E={bucket.experts},N={bucket.intermediate},device_name={device.replace(' ', '_')}{suffix}.json"


def load_foreign(file: Path, bucket: Bucket, device: str) -> Table:
    """Reads a file of vLLM or SGLang, and the one for the down GEMM beside it if there is one.

    Args:
        file: where it is; its name says what it is for.
        bucket: of the calls.
        device: name of the device.

    Returns:
        A table of variant "sorted".

    Raises:
        ConfigError: the file is broken; the message says where.
    """
    down_file = file.with_name(f"{file.stem}_down.json")
    ups = _tiles(file)
    downs = _tiles(down_file) if is_there(down_file) else ups
    entries = []
    for tokens in sorted(ups):
        up, down = ups[tokens], downs[min(downs, key=lambda other: abs(other - tokens))]
        up, down = replace(up, block_n=max(16, up.block_n // 2)), replace(down, block_m=up.block_m)
        entries.append(Entry(tokens, Tiles("sorted", up, down)))
    return Table(bucket, device, tuple(entries), foreign=True)


def _tiles(file: Path) -> dict[int, TileConfig]:
    value = read_json(file)
    whole = Fields(file, "", value)
    tiles = {}
    for key in value:
        if key == "triton_version":
            continue
        if not (key.isascii() and key.isdecimal()) or not 1 <= int(key[:18]) <= _MAX_TOKENS:
            raise ConfigError(f"{file}: the key {key[:40]!r} is not a number of tokens from 1 to {_MAX_TOKENS}")
        values = whole.object(key)
        numbers = [values.integer(f"BLOCK_SIZE_{dim}", 16, 256) for dim in "MNK"]
        numbers += [
            values.integer("GROUP_SIZE_M", 1, 256, 1),
            values.integer("num_warps", 1, 16, 4),
            values.integer("num_stages", 1, 8, 3),
        ]
        for name in _IGNORED:
            values.take(name, "anything", lambda value: True, None)
        values.finish()
        try:
            tiles[int(key)] = TileConfig(*numbers)
        except ValueError as error:
            raise whole.invalid(key, error) from error
    if not tiles:
        raise ConfigError(f"{file} has no tiles, expected an object with numbers of tokens as keys")
    return tiles
