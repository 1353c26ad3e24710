"""Tile sizes from the problem alone. Measured on one H200; see docs/kernels.md."""

import math
from dataclasses import replace

from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.routing import TOKEN_ROUTES
from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.variants import (
    active_experts,
    blockscaled_tiles,
    expected_rows,
    mixed_tiles,
    packed_tiles,
    pingpong_tiles,
)

# Triton's barriers and scratch beside the pipeline's stages.
SHARED_MEMORY_RESERVE = 2048

# Below this (sm_120 has 99 KiB) the large TMA tiles would be left with two stages, and spill.
_LARGE_SHARED_MEMORY = 160 * 1024

# Programs a multiprocessor that make numbers of weights, each of four warps; and of mxfp4's down GEMM.
_PROGRAMS, _PROGRAMS_LONG = 4, 1.5
# Variants whose down GEMM can have its K in parts.
SPLIT_VARIANTS = ("sorted", "packed")
# So many parts in "packed", of so many steps at least; programs that keep a multiprocessor busy.
_SPLITS, _SPLIT_STEPS, _BUSY = (1, 2, 4, 8), 5, 4
# In "sorted" up to so many rows an expert, in parts of so many steps at least, and below so many programs a
# multiprocessor, by format: the more a program has to do for a weight, the more of them keep the memory busy.
_SPLIT_ROWS, _SPLIT_LONG = 8, 8
_SPLIT_BELOW = {"packed": 3, "weights": 2, "rows": 1}
# I up to which the down GEMM's reduction is short, up to which it is over in a few steps, and from which it is long.
_SHORT_REDUCTION, _FEW_STEPS, _LONG_REDUCTION = 1024, 256, 4096
# Rows of an expert that are so few row blocks that a group of them has several experts in any case.
_FEW_ROWS = 128
# Rows an expert up to which a block of 64 holds most experts: they scatter around the mean by its root. Above, more and
# more second blocks read the weights again; below, a block of 128 would multiply as much padding as rows.
_ROWS_OF_64 = 60
# I up to which an expert has so few columns that a second row block, which reads them again, costs more than padding;
# but bytes that few are read again for less, up to so many rows an expert.
_SHORT_UP, _ROWS_OF_16 = 512, 16
# Rows of an expert from which a block of 32 would be too small for most.
_ROWS_OF_32 = 32
# H up to which a single token's up GEMM with scales of groups is better in more, shorter steps.
_SHORT_HIDDEN = 4096


def tile_configs(
    problem: Problem, device: Device, path: str, variant: str = "sorted", *, batch_invariant: bool
) -> tuple[TileConfig, TileConfig]:
    """Chooses the tiles of the up and the down GEMM.

    The row block follows the rows an expert can expect: a block must hold them, since a second block reads the
    expert's weights again, and must not be much larger, since padding rows cost as much as real ones.

    Args:
        problem: the call.
        device: where it runs.
        path: "tma" or "classic".
        variant: as `Plan.variant`.
        batch_invariant: choose without a look at the number of tokens.

    Returns:
        (up, down), with one `block_m`, within the device's shared memory.
    """
    if variant == "pingpong":
        return _pingpong(problem, device)
    if variant == "blockscaled":
        return blockscaled_tiles(problem)
    if variant == "packed":
        return packed_tiles(problem, device)
    if variant == "mixed":
        return mixed_tiles(problem)
    if variant == "direct":
        return _gemv(problem)
    rows_per_expert = 64.0 if batch_invariant else expected_rows(problem)
    itemsize = rows_itemsize(problem)
    if itemsize == 4:
        up, down = _fp32(rows_per_expert)
    elif problem.scheme.weights_only and device.capability is not None and device.capability[0] == 9:
        up, down = _weights_only(rows_per_expert, problem, device)
    elif path == "tma" and device.shared_memory >= _LARGE_SHARED_MEMORY:
        up, down = _tma(rows_per_expert, problem)
    else:
        up, down = _classic(rows_per_expert)
    if not problem.activation.gated:
        up = replace(up, block_n=min(256, 2 * up.block_n))
    if problem.scheme.quantized:
        # One step, one scale: a group of 128 columns. Fewer bytes a step would leave the memory idle. Beside a large
        # accumulator converted weights would spill, and a product that is added up by itself all the more.
        step_by_step = problem.scheme.name == "fp8_w8a8" or (problem.scheme.row_dtype and problem.scheme.scale_columns)
        most = 4096 if step_by_step else 16384 if problem.scheme.weights_only and up.swap_ab else 8192
        up, down = (replace(t, block_k=128, block_n=min(t.block_n, most // t.block_m)) for t in (up, down))
        if up.swap_ab and rows_per_expert <= 8 and problem.scheme.row_dtype is not None:
            up, down = _few_quantized_rows(rows_per_expert, problem, up, down)
    if down.swap_ab and not problem.scheme.weights_only and problem.intermediate_size <= _FEW_STEPS:
        # Steps as long as the reduction, or more stages than it has steps, are shared memory that others could use.
        down = replace(down, block_k=64) if down.block_m == 16 else replace(down, num_stages=3)
    shortest = 32 * problem.scheme.planes
    return (
        fit(up, device, itemsize, gated=problem.activation.gated, shortest=shortest),
        fit(down, device, itemsize, gated=False, shortest=shortest),
    )


def down_splits(problem: Problem, device: Device, variant: str, down: TileConfig) -> int:
    """Programs that share a tile of the down GEMM: several where a token or a few leave the device idle.

    It has fewer columns than the up GEMM and a longer K, and then too few tiles.

    Args:
        problem: the call.
        device: where it runs.
        variant: as `Plan.variant`; of others than "sorted" and "packed" it is 1.
        down: its tile.

    Returns:
        A power of two; 1 where there are tiles enough or steps too few.
    """
    if variant not in SPLIT_VARIANTS or device.kind != "cuda":
        return 1
    columns, steps = -(-problem.hidden_size // down.block_n), -(-problem.intermediate_size // down.block_k)
    if variant == "packed":
        tiles, at_once = active_experts(problem) * columns, down.packed_programs()
        choices = [s for s in _SPLITS if s == 1 or steps >= s * _SPLIT_STEPS]

        def programs(splits: int) -> float:
            """That a multiprocessor has time for until all are done, those of one part; each part is rows to add."""
            share = -(-tiles * splits // device.num_sms)
            # Four keep it busy until the last of them ends; fewer leave it idle where the last are few.
            whole = max(share, at_once) if at_once == _BUSY else -(-share // at_once) * at_once
            return whole / splits + splits / 10

        return 1 if tiles >= 2 * at_once * device.num_sms else min(choices, key=programs)
    below = _SPLIT_BELOW["packed" if problem.scheme.packed else "weights" if problem.scheme.weights_only else "rows"]
    if not problem.scheme.quantized or expected_rows(problem) > _SPLIT_ROWS:
        return 1
    programs, splits = min(problem.num_routes, problem.num_experts) * columns, 1
    while splits * programs < below * device.num_sms and steps >= 2 * splits * _SPLIT_LONG:
        splits *= 2
    return splits


def rows_itemsize(problem: Problem) -> int:
    """Bytes of an element of the rows that are multiplied."""
    return problem.dtype.itemsize if problem.scheme.row_dtype is None else problem.scheme.row_dtype.itemsize


def _pingpong(problem: Problem, device: Device) -> tuple[TileConfig, TileConfig]:
    up, down = pingpong_tiles(problem)
    if expected_rows(problem) <= _FEW_ROWS:
        return up, down
    group = row_group(device.num_sms)
    short = problem.intermediate_size <= _SHORT_REDUCTION
    return replace(up, group_m=group), down if short else replace(down, group_m=group)


def row_group(programs: int) -> int:
    """Row blocks that programs side by side have, where each has a tile of 64 rows and 256 rows of weights.

    R row blocks by C blocks of weights, R * C the number of programs, read 64 R + 256 C rows together: least where
    R = 2 sqrt(R * C). A divisor of the number of programs makes all of their steps alike.
    """
    ideal = 2 * math.sqrt(programs)
    divisors = [n for n in range(1, programs + 1) if programs % n == 0]
    nearest = min(divisors, key=lambda n: abs(math.log(n / ideal)))
    return nearest if 2 / 3 < nearest / ideal < 3 / 2 else round(ideal)


def _gemv(problem: Problem) -> tuple[TileConfig, TileConfig]:
    """Few rows of weights a program: some thousand elements on their way in each of many small programs."""
    scheme = problem.scheme
    stored = 2 if scheme.packed else 1
    grouped, both = scheme.scale_columns > 0, scheme.row_dtype is not None
    block_k = 512 if both and grouped and problem.hidden_size <= _SHORT_HIDDEN else 1024
    up = _gemv_tile(
        8 // (2 if problem.activation.gated else 1), block_k, problem.hidden_size // stored, problem.w1_strides
    )
    # The rows of a program of the down launch are those of all its slots. Of bytes it takes twice as many.
    slots = min(TOKEN_ROUTES, _power_of_2(problem.top_k))
    rows, block_k = (16, 128) if slots == TOKEN_ROUTES else (8, 512 if both and not grouped else 256)
    down = _gemv_tile(max(1, rows // slots), block_k, problem.intermediate_size // stored, problem.w2_strides)
    if problem.weight_dtype.itemsize < 4:
        return up, down
    return tuple(replace(t, block_k=max(1, t.block_k // 2)) for t in (up, down))


def _gemv_tile(block_n: int, block_k: int, reduction: int, strides: tuple[int, ...]) -> TileConfig:
    if strides[2] != 1:  # N-major: whole lines of rows side by side
        return TileConfig(1, 32, 32)
    return TileConfig(1, block_n, min(block_k, _power_of_2(reduction)))


def _power_of_2(n: int) -> int:
    """The next power of two; Triton, which has one, may be absent."""
    return 1 << (n - 1).bit_length()


def _tma(rows: float, problem: Problem) -> tuple[TileConfig, TileConfig]:
    """Swapped operands up to 60 rows: there the weights' bytes are all that counts, in many and deep loads."""
    if rows <= (_ROWS_OF_16 if rows_itemsize(problem) == 1 and problem.intermediate_size <= _SHORT_UP else 8):
        down = TileConfig(16, 64, 128, 4, 4, 4, True)
        if problem.intermediate_size <= _SHORT_REDUCTION:
            # A few steps cannot fill a pipeline: twice the columns instead.
            down = replace(down, block_n=128, num_stages=3)
        if rows < 2:
            return TileConfig(16, 32, 128, 4, 4, 4, True), down
        if rows <= 4:
            return TileConfig(16, 32, 256, 4, 4, 3, True), down
        return TileConfig(16, 64, 128, 4, 4, 3, True), down
    if rows <= 16 and problem.intermediate_size > _SHORT_UP:
        return TileConfig(32, 64, 128, 4, 4, 3, True), TileConfig(32, 64, 128, 4, 4, 4, True)
    if rows <= _ROWS_OF_64:
        return TileConfig(64, 64, 128, 4, 4, 3, True), TileConfig(64, 128, 64, 4, 4, 4, True)
    return TileConfig(128, 128, 64, 16, 8, 4), TileConfig(128, 256, 64, 16, 8, 4)


def _few_quantized_rows(
    rows: float, problem: Problem, up: TileConfig, down: TileConfig
) -> tuple[TileConfig, TileConfig]:
    """Rows of one byte an element take half the shared memory: twice the columns for as many bytes on their way."""
    if rows < 2:
        up = replace(up, block_n=64, num_stages=3)
    if problem.intermediate_size > _SHORT_REDUCTION:
        down = replace(down, block_n=128, num_stages=6 if problem.intermediate_size >= _LONG_REDUCTION else 4)
    return up, down


def _weights_only(rows: float, problem: Problem, device: Device) -> tuple[TileConfig, TileConfig]:
    """Swapped operands whatever the rows: wgmma takes the weights, made in registers, from there.

    A program has 64 rows of weights, or with few rows 128 where that leaves enough programs to make numbers of them
    side by side. mxfp4 has no use for 128 where its scales cannot be copied a step ahead, which takes whole steps.
    With groups a step's sums stand beside the others: more than 64 rows would spill.
    """
    if rows > 96 and not problem.scheme.scale_columns:
        return TileConfig(128, 64, 128, 8, 8, 3, True), TileConfig(128, 128, 128, 8, 8, 3, True)
    if rows > _ROWS_OF_32 and not problem.scheme.scale_columns:
        # Twice the weights a program, by twice the warps.
        return TileConfig(64, 64, 128, 8, 8, 3, True), TileConfig(64, 128, 128, 8, 8, 3, True)
    experts = min(problem.num_routes, problem.num_experts)
    mx = problem.scheme.name == "mxfp4_w4a16"

    def columns(count: int, reduction: int, programs: float) -> int:
        few = count // 128 * experts < programs * device.num_sms or (mx and reduction % 128) or rows > 8
        return 64 if few else 128

    block_m = 16 if rows <= 8 else 32 if rows <= 16 else 64
    up = columns(problem.w1_rows, problem.hidden_size, _PROGRAMS) // 2 if mx else 32
    down = columns(problem.hidden_size, problem.intermediate_size, _PROGRAMS_LONG if mx else _PROGRAMS)
    return TileConfig(block_m, up, 128, 4, 4, 3, True), TileConfig(block_m, down, 128, 4, 4, 3, True)


def _classic(rows: float) -> tuple[TileConfig, TileConfig]:
    if rows <= 8:
        return TileConfig(16, 64, 128, 8, 4, 3), TileConfig(16, 128, 128, 8, 4, 3)
    if rows <= 16:
        return TileConfig(32, 64, 64, 8, 4, 4), TileConfig(32, 128, 64, 8, 4, 4)
    if rows <= 48:
        return TileConfig(64, 64, 64, 8, 4, 3), TileConfig(64, 128, 64, 8, 4, 3)
    return TileConfig(128, 64, 64, 16, 8, 3), TileConfig(128, 128, 64, 16, 8, 3)


def _fp32(rows: float) -> tuple[TileConfig, TileConfig]:
    block_m = 16 if rows <= 16 else 64
    return TileConfig(block_m, 32, 32, 8, 4, 3), TileConfig(block_m, 64, 32, 8, 4, 3)


def fit(config: TileConfig, device: Device, itemsize: int, *, gated: bool, shortest: int = 32) -> TileConfig:
    """Shrinks a tile until the device's shared memory holds it: first its stages, then its steps and columns.

    A step has at least `shortest` elements: 32 bytes of packed weights are 64.
    """
    limit = device.shared_memory - SHARED_MEMORY_RESERVE
    while config.shared_memory(itemsize, gated=gated) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > shortest:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_n > 32:
            config = replace(config, block_n=config.block_n // 2)
        else:
            raise ValueError(f"no tile fits into {device.shared_memory} bytes of shared memory on {device.name}")
    return config
