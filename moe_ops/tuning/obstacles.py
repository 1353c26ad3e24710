"""Why tiles cannot run a call on a device: what a kernel variant demands of them, and what the device has room for."""

from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.quantization.scheme import GROUP
from moe_ops.routing import TOKEN_ROUTES
from moe_ops.tuning.config import TileConfig
from moe_ops.tuning.heuristics import SHARED_MEMORY_RESERVE, rows_itemsize
from moe_ops.tuning.variants import (
    PINGPONG_STAGES,
    blockscaled_tiles,
    mixed_tiles,
    pingpong_tiles,
    tiles_obstacle,
    variant_obstacle,
)

# Elements of a plane whose order `kernels.layout.unit_order` changes: a step has whole ones.
PLANE_UNIT = 32
# Sums (fp32) or products that a thread holds; beside its operands and addresses more would spill.
_THREAD_VALUES = 128
_WARP = 32
_LARGEST_BOX = 256
# Stages with which a variant's rings still run ahead; the block-scaled ones have as many as they have.
_FEWEST_STAGES = {"pingpong": 3, "mixed": 2}


def form_obstacle(problem: Problem, variant: str, up: TileConfig, down: TileConfig) -> str | None:
    """Why a variant's kernels cannot be built with these tiles, on any device; None if they can."""
    if up.block_m != down.block_m:
        return f"up.block_m is {up.block_m} and down.block_m {down.block_m}; both must be the same"
    unsorted = variant == "direct"
    if (up.block_m == 1) != unsorted:
        return f"block_m is {up.block_m} in variant {variant!r}; it is 1 in 'direct', and in no other"
    smallest = min(min(tile.block_m, tile.block_n, tile.block_k) for tile in (up, down))
    if variant not in ("direct", "packed") and smallest < 16:
        return f"a block of {up} or {down} is below 16, which only variants 'direct' and 'packed' can have"
    least = PLANE_UNIT * problem.scheme.planes
    if problem.scheme.packed and not unsorted and min(up.block_k, down.block_k) < least:
        return f"block_k of {up} or {down} is below {least}, {PLANE_UNIT} bytes of packed weights"
    blocks = problem.scheme.row_dtype is not None and problem.scheme.scale_columns > 0
    if blocks and not unsorted and max(up.block_k, down.block_k) > GROUP:
        return f"block_k of {up} or {down} is above {GROUP}, the columns that share a scale of the rows"
    return tiles_obstacle(variant, problem, up, down)


def tuned_obstacle(
    problem: Problem, device: Device, path: str, variant: str, up: TileConfig, down: TileConfig
) -> str | None:
    """Why tiles that somebody wrote down should not run a call: the variant, its kernels, or the device's resources.

    Args:
        problem: the call.
        device: where it runs.
        path: "tma" or "classic".
        variant: as `Plan.variant`.
        up: tile of the up GEMM.
        down: tile of the down GEMM.

    Returns:
        The reason; None if they fit. Registers are an estimate: the values that a thread has to hold at least.
    """
    obstacle = variant_obstacle(variant, problem, device, path) or form_obstacle(problem, variant, up, down)
    if obstacle is not None:
        return obstacle
    if variant == "packed":
        return None  # what its tiles may be fits
    if variant in ("pingpong", "blockscaled", "mixed"):
        return _stages_obstacle(problem, variant, up, down)
    gated = problem.activation.gated
    if variant == "direct":
        slots = min(TOKEN_ROUTES, 1 << (problem.top_k - 1).bit_length())
        return _values_obstacle("up", up, up.block_n * (2 if gated else 1) * up.block_k) or _values_obstacle(
            "down", down, down.block_n * slots * down.block_k
        )
    itemsize, limit = rows_itemsize(problem), device.shared_memory - SHARED_MEMORY_RESERVE
    interleaved = problem.gate_up_layout == "interleaved"
    for name, tile, halves in (("up", up, gated), ("down", down, False)):
        columns = tile.block_n * (2 if halves else 1)
        taken = tile.shared_memory(itemsize, gated=halves)
        if taken > limit:
            return f"{name} takes {taken} bytes of shared memory, and {device.name or 'the device'} has {limit} for it"
        obstacle = _values_obstacle(name, tile, tile.block_m * columns)
        if obstacle is not None:
            return obstacle
        box = columns if interleaved else tile.block_n
        if path == "tma" and max(box, tile.block_k) > _LARGEST_BOX:
            return f"{name} needs a TMA box of {box} by {tile.block_k}, and {_LARGEST_BOX} is the most either way"
    return None


def _stages_obstacle(problem: Problem, variant: str, up: TileConfig, down: TileConfig) -> str | None:
    """The rings of the kernels for Hopper fill the shared memory as they are, and the block-scaled ones have a form."""
    if variant == "mixed":
        owns = mixed_tiles(problem, up.block_m)
    else:
        owns = pingpong_tiles(problem) if variant == "pingpong" else blockscaled_tiles(problem)
    for name, tile, own in zip(("up", "down"), (up, down), owns, strict=True):
        least = _FEWEST_STAGES.get(variant, own.num_stages)
        most = PINGPONG_STAGES if variant == "pingpong" else own.num_stages
        if not least <= tile.num_stages <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            return f"{name}.num_stages is {tile.num_stages}, and variant {variant!r} has room for {wanted}"
    return None


def _values_obstacle(name: str, tile: TileConfig, values: int) -> str | None:
    most = _THREAD_VALUES * _WARP * tile.num_warps
    if values > most:
        return f"{name} has {values} values for {tile.num_warps} warps, which hold {most} without spilling"
    return None
