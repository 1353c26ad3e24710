"""Kernel variants: when each can run, when it is the best, and the tiles of the kernels for Hopper."""

import math
from dataclasses import replace

from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.tuning.config import TileConfig

# First Triton whose Gluon the kernel is written for.
_FIRST_TRITON = (3, 6)
# What a thread copies of a row.
_COPY_BYTES = 16


# As `Plan.variant`.
VARIANTS = ("direct", "sorted", "pingpong", "blockscaled", "packed", "mixed")

# Rows an expert can expect above which the ping-pong kernel is ahead. Measured, see docs/kernels.md.
_PINGPONG_ROWS = 64
# The same for fp8: the general kernel has its scales in the way, and more so the more rows there are.
_QUANTIZED_ROWS = 16
# Weights of one token's routes up to which quantised ones are multiplied without a sort, and where "packed" takes them.
_DIRECT_WEIGHTS, _DIRECT_PACKED_WEIGHTS = 60_000_000, 15_000_000
# The same up to which the kernel for packed weights is: it spends its time on making numbers of them, not on products.
_PACKED_ROWS = 16
# The same up to which its row blocks are of 8: half the padding, and half the copies. Twice as many scatter too widely.
_PACKED_FEW_ROWS = 4
# What it takes: K steps, rows of weights, groups of columns with a scale, rows of w1's sides that lie together, and
# weights that it reads at once.
_PACKED_STEP, _PACKED_WEIGHTS, _PACKED_GROUPS, _SIDE, _CODES = 256, 64, (32, 64, 128), 8, 4
# Most stages that fit with 32 rows.
_PACKED_STAGES = 8
# Rows an expert can expect above which variant "mixed" is ahead.
_MIXED_ROWS = {"int8_w8a16": 16, "int4_w4a16": 20, "mxfp4_w4a16": 16}
# Rows an expert can expect up to which a block of 64 holds those of nearly all.
_ONE_BLOCK_ROWS = 48
# Column blocks up to which programs side by side, each row block's together, still have several row blocks: where
# routing is uneven, those of one expert are among them.
_FEW_COLUMN_BLOCKS = 64
# Stages of the ping-pong kernel's ring that fit.
PINGPONG_STAGES = 5
# Rows an expert can expect above which the block-scaled kernel's row block is 128: less traffic, but more padding.
_BLOCKSCALED_SPLIT_ROWS = 240


def expected_rows(problem: Problem) -> float:
    """Routes per expert that has any, were they spread evenly."""
    return problem.num_routes / max(1, min(problem.num_routes, problem.num_experts))


def choose_variant(problem: Problem, device: Device, path: str, *, batch_invariant: bool) -> str:
    """Chooses the kernel variant.

    One token's routes go to different experts as a rule: sorting them saves no weights and costs a launch. N-major
    weights give a thread no piece of a row to multiply, and stay with the tensor cores. Batch invariance asks for one
    variant whatever the number of tokens.
    """
    if batch_invariant:
        return "sorted"
    k_major = problem.w1_strides[2] == 1 == problem.w2_strides[2]
    if problem.num_tokens == 1 and k_major and _few_weights(problem, device, path):
        return "direct"
    if expected_rows(problem) > (_QUANTIZED_ROWS if problem.scheme.quantized else _PINGPONG_ROWS):
        for variant in ("pingpong", "blockscaled"):
            if variant_obstacle(variant, problem, device, path) is None:
                return variant
    many = expected_rows(problem) > _MIXED_ROWS.get(problem.scheme.name, math.inf)
    if many and variant_obstacle("mixed", problem, device, path) is None:
        return "mixed"
    if expected_rows(problem) <= _PACKED_ROWS and variant_obstacle("packed", problem, device, path) is None:
        return "packed"
    return "sorted"


def _few_weights(problem: Problem, device: Device, path: str) -> bool:
    """Whether matrix-vector products of all routes cost less than the launches of the others.

    Threads that make numbers of quantised weights, and not the memory, set their pace: that of "packed" is higher.
    """
    if not problem.scheme.quantized:
        return True
    weights = problem.top_k * problem.hidden_size * (problem.w1_rows + problem.intermediate_size)
    packed = variant_obstacle("packed", problem, device, path) is None
    return weights <= (_DIRECT_PACKED_WEIGHTS if packed else _DIRECT_WEIGHTS)


def variant_obstacle(variant: str, problem: Problem, device: Device, path: str) -> str | None:
    """Why a variant cannot run a call on a path; None if it can."""
    obstacle = _OBSTACLES.get(variant)
    if obstacle is None:
        return None
    if path != "tma":
        return f"it needs the TMA path, and this call takes {path!r}"
    return obstacle(problem, device)


def pingpong_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the ping-pong kernel cannot run a call on the TMA path; None if it can.

    What keeps a call from the TMA path at all is `dispatch.tma_obstacle`'s to say, and taken as checked.
    """
    scheme = problem.scheme
    if scheme.name not in ("none", "fp8_w8a8"):
        return f"quantization is {scheme.name!r}, and it multiplies 16-bit operands, or fp8 ones of 'fp8_w8a8'"
    if scheme.scale_columns:
        return "the weights have a scale per block, and it applies scales to whole rows, after the sum over K"
    return _hopper_obstacle(problem, device)


def blockscaled_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the block-scaled kernel cannot run a call on the TMA path; None if it can."""
    scheme = problem.scheme
    if scheme.name != "fp8_w8a8" or not scheme.scale_columns:
        return "the weights are not fp8 with a scale per block of [128, 128]"
    return _hopper_obstacle(problem, device)


def packed_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the kernels for packed weights and few rows cannot run a call on the TMA path; None if they can."""
    scheme = problem.scheme
    if not scheme.packed or scheme.row_dtype is not None:
        return "the weights are not packed, two to a byte"
    if scheme.scale_columns not in _PACKED_GROUPS:
        return f"a scale is of {scheme.scale_columns} columns, and it takes groups of {_listed(_PACKED_GROUPS)}"
    if problem.hidden_size % _CODES:
        return f"H is {problem.hidden_size}, not a multiple of {_CODES}, the weights of 16 bits"
    if problem.intermediate_size % _SIDE:
        return f"I is {problem.intermediate_size}, not a multiple of {_SIDE}, of which gate and up lie side by side"
    return _two_bytes_obstacle(problem) or _gluon_obstacle(problem, device)


def mixed_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the kernel for 8- or 4-bit weights beside 16-bit rows cannot run a call on the TMA path; None if it can."""
    scheme = problem.scheme
    if not scheme.weights_only:
        return f"quantization is {scheme.name!r}, and it multiplies 8- or 4-bit weights by 16-bit rows"
    if scheme.scale_columns not in (0, *_PACKED_GROUPS):
        return f"a scale is of {scheme.scale_columns} columns, and it takes rows or groups of {_listed(_PACKED_GROUPS)}"
    if scheme.zero_points and not scheme.packed:
        return "8-bit weights have zero points, and it has registers for those of 4-bit ones"
    codes = 2 * scheme.planes
    for name, size in (("H", problem.hidden_size), ("I", problem.intermediate_size)):
        if size % codes:
            return f"{name} is {size}, not a multiple of {codes}, the weights of 16 bits"
    return _two_bytes_obstacle(problem) or _gluon_obstacle(problem, device)


def _two_bytes_obstacle(problem: Problem) -> str | None:
    """Why weights cannot be read two bytes at once along K; None if they can."""
    for name, strides, address in (
        ("w1", problem.w1_strides, problem.w1_address), ("w2", problem.w2_strides, problem.w2_address)
    ):  # fmt: skip
        if strides[2] != 1:
            return f"{name} is N-major, and it reads rows along K"
        if (strides[0] | strides[1] | address) % 2:
            return f"{name} does not lie at multiples of two bytes, which it reads at once"
    return None


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


# Variants that not every call on the TMA path can have.
_OBSTACLES = {
    "pingpong": pingpong_obstacle, "blockscaled": blockscaled_obstacle, "packed": packed_obstacle,
    "mixed": mixed_obstacle,
}  # fmt: skip


def _gluon_obstacle(problem: Problem, device: Device) -> str | None:
    """Why no kernel in Gluon for Hopper can run in this dtype on a device."""
    if device.kind != "cuda" or device.capability is None:
        return "it is written in Gluon for NVIDIA GPUs (on the CPU, within moe_ops.testing.hopper.hopper())"
    if device.capability[0] != 9:
        major, minor = device.capability
        return f"{device.name or 'the device'} has compute capability {major}.{minor}, and wgmma is 9.x alone"
    if device.triton is None or _version(device.triton) < _FIRST_TRITON:
        return f"Triton is {device.triton}, and its Gluon is needed from 3.6 on"
    if problem.dtype.itemsize != 2:
        return f"the GEMMs are in {problem.dtype}, and it computes in bfloat16 and float16"
    return None


def _hopper_obstacle(problem: Problem, device: Device) -> str | None:
    """Why no kernel in Gluon for Hopper whose rows are gathered as they are can run a call on the TMA path."""
    obstacle = _gluon_obstacle(problem, device)
    if obstacle is not None:
        return obstacle
    fp8 = problem.scheme.quantized
    unit = _COPY_BYTES // (1 if fp8 else problem.dtype.itemsize)
    if problem.hidden_size % unit:
        return (
            f"H is {problem.hidden_size}, not a multiple of {unit}: rows of hidden_states cannot be copied by 16 bytes"
        )
    if fp8 and problem.intermediate_size % unit:
        return f"I is {problem.intermediate_size}, not a multiple of {unit}: TMA steps over rows by 16 bytes"
    for name, strides in (("w1", problem.w1_strides), ("w2", problem.w2_strides)):
        if fp8 and strides[2] != 1:
            return f"{name} is N-major, and the tensor cores take fp8 from K-major operands alone"
    return None


def pingpong_tiles(problem: Problem) -> tuple[TileConfig, TileConfig]:
    """(up, down): 64 rows and 256 rows of weights, two consumers of 4 warps, steps of 128 bytes along K."""
    block_k = 128 if problem.scheme.quantized else 64
    up, down = (
        TileConfig(64, 256, block_k, 16, 4, _pingpong_stages(-(-size // block_k)))
        for size in (problem.hidden_size, problem.intermediate_size)
    )
    return _one_side_by_side(problem, replace(up, block_n=128) if problem.activation.gated else up, down)


def _one_side_by_side(problem: Problem, up: TileConfig, down: TileConfig) -> tuple[TileConfig, TileConfig]:
    """The same tiles in an order by row blocks, where few experts have two: no weights are shared then.

    Memory serves columns of one expert, which lie together, a little faster than those of many.
    """
    if expected_rows(problem) > _ONE_BLOCK_ROWS:
        return up, down
    return tuple(
        replace(tile, group_m=1) if -(-columns // tile.block_n) <= _FEW_COLUMN_BLOCKS else tile
        for tile, columns in ((up, problem.intermediate_size), (down, problem.hidden_size))
    )


def _pingpong_stages(k_steps: int) -> int:
    """As many as fit, or one less where that has room for a whole tile.

    Short tiles spend their time on storing the result: a stage's memory is for a second box of each consumer then.
    """
    return max(PINGPONG_STAGES - 1, min(k_steps, PINGPONG_STAGES))


def blockscaled_tiles(problem: Problem) -> tuple[TileConfig, TileConfig]:
    """(up, down): two consumers, 64 rows and 256 rows of weights each, with a row block each or one for both."""
    block_m = 128 if expected_rows(problem) > _BLOCKSCALED_SPLIT_ROWS else 64
    down = TileConfig(block_m=block_m, block_n=256, block_k=128, group_m=16, num_warps=4, num_stages=5)
    return _one_side_by_side(problem, replace(down, block_n=128) if problem.activation.gated else down, down)


def packed_tiles(problem: Problem, device: Device) -> tuple[TileConfig, TileConfig]:
    """(up, down): as few rows as an expert needs, 64 rows of weights, and steps of 128 bytes of them.

    Three stages leave room for four programs on a multiprocessor, four for three: for tiles that all run at once then.
    With 8 rows four programs have room for four stages each, and three are faster.
    """
    rows = expected_rows(problem)
    block_m = 8 if rows <= _PACKED_FEW_ROWS else 16 if rows <= 8 else 32
    # Experts of few rows have one block, whose columns then lie together; else blocks that share weights run together.
    down = TileConfig(block_m, _PACKED_WEIGHTS, _PACKED_STEP, 1 if block_m == 8 else 8, 4, 3, True)
    deep = replace(down, num_stages=4)
    tiles = active_experts(problem) * -(-problem.w1_rows // _PACKED_WEIGHTS)
    if block_m > 8 and tiles <= deep.packed_programs() * device.num_sms:
        down = deep
    return (replace(down, block_n=_PACKED_WEIGHTS // 2) if problem.activation.gated else down), down


def mixed_tiles(problem: Problem, block_m: int | None = None) -> tuple[TileConfig, TileConfig]:
    """(up, down): two consumers, with 128 rows and 128 rows of weights each, and the stages that then fit.

    With few rows an expert 64 of them, and longer steps: less padding, and whole lines of weights from memory.
    """
    if block_m is None:
        block_m = 64 if expected_rows(problem) <= _ONE_BLOCK_ROWS else 128
    if block_m == 64:
        down = TileConfig(64, 128, 128, 8, 4, 4 if problem.scheme.packed else 3, True)
    else:
        down = TileConfig(block_m, 128, 64, 8, 4, 4, True)
    return _one_side_by_side(problem, replace(down, block_n=64) if problem.activation.gated else down, down)


def active_experts(problem: Problem) -> float:
    """Experts that expect a route, of tokens that choose theirs evenly and independently."""
    missed = 1 - min(1, problem.top_k / problem.num_experts)
    return problem.num_experts * (1 - missed**problem.num_tokens)


def tiles_obstacle(variant: str, problem: Problem, up: TileConfig, down: TileConfig) -> str | None:
    """Why a variant that has tiles of its own cannot have these; None if it can, or has none of its own."""
    if variant == "pingpong":
        owns = pingpong_tiles(problem)
    elif variant == "packed":
        return _packed_tiles_obstacle(problem, up, down)
    elif variant == "blockscaled":
        block_m = 128 if up.block_m == down.block_m == 128 else 64
        owns = tuple(replace(tile, block_m=block_m) for tile in blockscaled_tiles(problem))
    elif variant == "mixed":
        owns = mixed_tiles(problem, 64 if up.block_m == down.block_m == 64 else 128)
    else:
        return None
    for name, tile, own in zip(("up", "down"), (up, down), owns, strict=True):
        if replace(tile, group_m=own.group_m, num_stages=own.num_stages) != own:
            return f"{name} is {tile}, and variant {variant!r} has {own}; only group_m and num_stages may differ"
    return None


def _packed_tiles_obstacle(problem: Problem, up: TileConfig, down: TileConfig) -> str | None:
    """Rows are 8, 16 or 32, stages as many as fit; the rest is as it is."""
    columns = _PACKED_WEIGHTS // 2 if problem.activation.gated else _PACKED_WEIGHTS
    for name, tile, block_n in (("up", up, columns), ("down", down, _PACKED_WEIGHTS)):
        own = TileConfig(tile.block_m, block_n, _PACKED_STEP, tile.group_m, 4, tile.num_stages, True)
        if tile != own or tile.block_m not in (8, 16, 32) or not 2 <= tile.num_stages <= _PACKED_STAGES:
            return (
                f"{name} is {tile}, and variant 'packed' has {own}, block_m 8, 16 or 32 and num_stages 2 to "
                f"{_PACKED_STAGES}"
            )
    return None


def _version(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
