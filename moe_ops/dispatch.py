"""Problem + device -> Plan: which path runs, why, and with what tiles. Nothing here touches a device.

Pure but for the tables of tuned tiles, which are read once (`moe_ops.tuning.lookup`).
"""

import contextlib
import contextvars
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from moe_ops import env, routing
from moe_ops.devices import Device
from moe_ops.problem import PATHS, Problem
from moe_ops.quantization.scheme import GROUP
from moe_ops.tuning import (
    SPLIT_VARIANTS,
    VARIANTS,
    TileConfig,
    choose_variant,
    down_splits,
    tile_configs,
    tuned_tiles,
    variant_obstacle,
)
from moe_ops.tuning.obstacles import PLANE_UNIT, form_obstacle

# TMA: base addresses and all strides but the innermost in units of 16 bytes.
_TMA_ALIGNMENT = 16
_ROW_UNIT = 16
_FP8_CAPABILITY = (8, 9)
_MOST_SPLITS = 64
_INTERPRETER_CURE = "set TRITON_INTERPRET=1 before the process starts to run Triton kernels on the CPU"


@dataclass(frozen=True)
class Plan:
    """How a call will run.

    Attributes:
        path: "tma", "classic", "cpu" or "reference".
        reason: why this path, in words.
        variant: "direct" (no sort, matrix-vector products of each route), "sorted", "pingpong" (sorted, with the
            warp-specialised GEMMs), "blockscaled" (the same for fp8 with a scale per block), "packed" (sorted,
            with GEMMs for packed weights and few rows an expert), "mixed" (the same for int8 weights and many); "" on
            the paths without kernels.
        dependent_launch: each kernel may start while the one before it finishes.
        up: tile of the up GEMM; None on the paths without tiles.
        down: tile of the down GEMM; None on the paths without tiles.
        max_tiles: upper bound of the row blocks, from shapes alone.
        num_sms: the device's multiprocessors, for persistent kernels.
        planes: weights in one element of what is stored, as the kernels of "sorted" read it; those of a row with one
            remainder by it are together in its activations, in planes.
        splits: programs that share a tile of the down GEMM in "sorted" and "packed", each with a part of K.
        workspace_bytes: device memory taken beside the result.
        source: where the tiles come from: "heuristic", "forced", or the file that they were read from; "" on the paths
            without tiles.
        kernels: what was compiled for it, filled by the backends as they launch; no part of the plan's value.
    """

    path: str
    reason: str
    variant: str = ""
    dependent_launch: bool = False
    up: TileConfig | None = None
    down: TileConfig | None = None
    max_tiles: int = 0
    num_sms: int = 1
    planes: int = 1
    splits: int = 1
    workspace_bytes: int = 0
    source: str = ""
    kernels: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def persistent(self) -> bool:
        """Whether the programs of its GEMMs run many tiles, and keep in step by counters."""
        return self.variant in ("pingpong", "blockscaled", "mixed")

    @property
    def block_m(self) -> int:
        """Rows of a row block; 0 on the paths without tiles."""
        return 0 if self.up is None else self.up.block_m

    @property
    def max_rows(self) -> int:
        """Upper bound of the sorted rows, padding included."""
        return self.max_tiles * self.block_m

    def plane_width(self, columns: int) -> int:
        """Elements from one plane of a row of so many columns to the next, as `kernels.layout.plane_stride`."""
        return -(-columns // self.planes // PLANE_UNIT) * PLANE_UNIT

    def part_width(self, columns: int) -> int:
        """Elements of a row of variant "mixed": whole parts of 64, 128 bytes."""
        return (columns + 63) // 64 * 64


@dataclass(frozen=True)
class Override:
    """What `moe_ops.testing.override` forces."""

    path: str | None = None
    variant: str | None = None
    up: TileConfig | None = None
    down: TileConfig | None = None
    splits: int | None = None

    def __post_init__(self) -> None:
        if self.splits is not None and not 1 <= self.splits <= _MOST_SPLITS:
            raise ValueError(f"splits is {self.splits}, expected 1 to {_MOST_SPLITS}")
        for name, allowed in (("path", PATHS), ("variant", VARIANTS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


_override: contextvars.ContextVar[Override | None] = contextvars.ContextVar("moe_ops_override", default=None)


@contextlib.contextmanager
def override(value: Override) -> Iterator[None]:
    """Forces a path or tiles for the calls in the block; see `moe_ops.testing.override`."""
    token = _override.set(value)
    try:
        yield
    finally:
        _override.reset(token)


def current_override() -> Override | None:
    """What the calls of this context are forced to."""
    return _override.get()


def make_plan(problem: Problem, device: Device) -> Plan:
    """Chooses path and tiles.

    Raises:
        ValueError: the path that was asked for cannot run; the message says why and what to do.
    """
    forced = current_override()
    if forced is not None and forced.path is not None:
        problem = replace(problem, path=forced.path)
    path, reason = choose_path(problem, device)
    if path in ("cpu", "reference"):
        return Plan(path, reason)
    invariant = env.batch_invariant()
    variant = choose_variant(problem, device, path, batch_invariant=invariant)
    tuned, source = None, "heuristic"
    if forced is not None and (forced.variant or forced.up or forced.down):
        variant = forced.variant or _variant_of(forced.up or forced.down)
        obstacle = variant_obstacle(variant, problem, device, path)
        if obstacle is not None:
            raise ValueError(f"variant is {variant!r}, but {obstacle}; leave it out, or pass variant='sorted'")
    elif not invariant:
        tuned = tuned_tiles(problem, device, path)
    if tuned is not None:
        variant, up, down, source = tuned.variant, tuned.up, tuned.down, tuned.source
    else:
        up, down = tile_configs(problem, device, path, variant, batch_invariant=invariant)
    if forced is not None and (forced.up or forced.down):
        up, down, source = forced.up or up, forced.down or down, "forced"
    obstacle = form_obstacle(problem, variant, up, down)
    if obstacle is not None:
        raise ValueError(obstacle)
    max_tiles = problem.num_routes
    if variant != "direct":
        max_tiles = routing.max_row_blocks(problem.num_routes, problem.num_experts, up.block_m)
    dependent_launch = device.capability is not None and device.capability >= (9, 0) and not device.interpreted
    planes = _planes(problem, variant, up, down)
    splits = 1 if invariant else down_splits(problem, device, variant, down)
    if forced is not None and forced.splits is not None:
        if variant not in SPLIT_VARIANTS:
            raise ValueError(f"splits is {forced.splits}, but variant is {variant!r}; pass variant='sorted' too")
        splits = forced.splits
    plan = Plan(
        path, reason, variant, dependent_launch, up, down, max_tiles, device.num_sms, planes, splits, source=source
    )  # fmt: skip
    return replace(plan, workspace_bytes=_workspace_bytes(problem, plan))


def _variant_of(tile: TileConfig | None) -> str:
    """The variant that forced tiles mean where none is forced with them."""
    return "direct" if tile is not None and tile.block_m == 1 else "sorted"


def _planes(problem: Problem, variant: str, up: TileConfig, down: TileConfig) -> int:
    """As `Plan.planes`: two bytes at once where the weights' layout has them and the tiles' steps are long enough."""
    scheme = problem.scheme
    if variant not in ("direct", "sorted", "packed", "mixed") or not scheme.weights_only:
        return 1
    planes = 2 * scheme.planes
    strides = problem.w1_strides, problem.w2_strides
    wide = (
        problem.dtype.itemsize == 2
        and all(size % planes == 0 for size in (problem.hidden_size, problem.intermediate_size))
        and all(s[2] == 1 and s[0] % 2 == s[1] % 2 == 0 for s in strides)
        and problem.w1_address % 2 == problem.w2_address % 2 == 0
        and (variant in ("direct", "mixed") or min(up.block_k, down.block_k) >= PLANE_UNIT * planes)
    )
    return planes if wide else scheme.planes


def row_stride(columns: int) -> int:
    """Elements from one workspace row to the next: in units that TMA can step over and Triton sees as aligned."""
    return (columns + _ROW_UNIT - 1) // _ROW_UNIT * _ROW_UNIT


def _workspace_bytes(problem: Problem, plan: Plan) -> int:
    scheme, quantized = problem.scheme, 0
    act = plan.max_rows * row_stride(problem.intermediate_size) * problem.dtype.itemsize
    if plan.variant == "direct":
        return act
    if plan.variant == "blockscaled" or (plan.variant == "pingpong" and scheme.act in ("tensor", "expert")):
        act = 0  # quantised before it is stored
    row_bytes = row_stride(problem.hidden_size) * (problem.dtype.itemsize if plan.splits == 1 else 4)
    rows = plan.splits * plan.max_rows * row_bytes
    if plan.variant == "mixed":
        widths = (plan.part_width(size) for size in (problem.hidden_size, problem.intermediate_size))
        act = plan.max_rows * sum(widths) * problem.dtype.itemsize
    elif plan.planes > 1:
        width = plan.planes * problem.dtype.itemsize
        act = plan.max_rows * plan.plane_width(problem.intermediate_size) * width
        rows += problem.num_tokens * plan.plane_width(problem.hidden_size) * width
    if scheme.quantizes_inputs:
        quantized += _quantized_bytes(problem.num_tokens, problem.hidden_size, scheme.inputs)
    if scheme.act:
        quantized += _quantized_bytes(plan.max_rows, problem.intermediate_size, scheme.act)
    sort = routing.workspace_bytes(problem.num_routes, problem.num_experts, plan.block_m)
    if plan.persistent:
        sort += 4 * math.prod(routing.PROGRESS)
    return act + rows + quantized + sort


def _quantized_bytes(num_rows: int, columns: int, granularity: str) -> int:
    """Rows of one byte an element, and their scales where they are not given."""
    scales = {"token": 1, "group": -(-columns // GROUP)}.get(granularity, 0)
    return num_rows * (row_stride(columns) + 4 * scales)


def choose_path(problem: Problem, device: Device) -> tuple[str, str]:
    """(path, reason). Raises ValueError where the path that was asked for cannot run."""
    asked = problem.path
    if asked == "reference":
        return "reference", "asked for"
    if asked == "auto" and device.kind == "cpu":
        return "cpu", "the tensors are on the CPU"
    if asked in ("auto", "classic") or device.kind != "cuda":
        obstacle = triton_obstacle(device)
        obstacle = obstacle or format_obstacle(problem, device)
        if obstacle is not None:
            asked_for = "" if asked == "auto" else f"path is {asked!r}, but "
            raise ValueError(f"{asked_for}{obstacle}")
    if asked == "classic":
        return "classic", "asked for"
    obstacle = tma_obstacle(problem, device)
    if obstacle is None:
        return "tma", "asked for" if asked == "tma" else "the device has TMA and the weights can be described to it"
    if asked == "tma":
        raise ValueError(f"path is 'tma', but {obstacle}; pass path='auto' or path='classic'")
    return "classic", f"no TMA: {obstacle}"


def triton_obstacle(device: Device) -> str | None:
    """Why no Triton kernel can run there, with the way out; None if one can."""
    if device.triton is None and (device.kind == "cuda" or device.interpreted):
        return "Triton is not installed; install triton>=3.6, or pass path='reference'"
    if device.kind == "cpu" and not device.interpreted:
        return f"the tensors are on the CPU; move them to a CUDA device, pass path='auto', or {_INTERPRETER_CURE}"
    if device.kind not in ("cpu", "cuda"):
        return f"there are no kernels for device type {device.kind!r}; move the tensors to a CUDA device or the CPU"
    return None


def format_obstacle(problem: Problem, device: Device) -> str | None:
    """Why no Triton kernel there multiplies a call's format, with the way out; None if one does."""
    if problem.scheme.name != "fp8_w8a8" or device.interpreted or device.capability is None:
        return None
    if device.capability < _FP8_CAPABILITY:
        major, minor = device.capability
        return (
            f"{device.name or 'the device'} has compute capability {major}.{minor}, and fp8 needs 8.9; dequantise the "
            "weights (moe_ops.quantization.dequantize), or pass path='reference'"
        )
    return None


def tma_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the TMA path cannot run this call there; None if it can."""
    if not device.interpreted:
        if device.kind != "cuda":
            return triton_obstacle(device)
        if device.capability is None:
            return f"{device.name or 'the device'} is not an NVIDIA GPU"
        if device.capability < (9, 0):
            major, minor = device.capability
            return f"{device.name or 'the device'} has compute capability {major}.{minor}, and TMA needs 9.0"
    if not device.has_descriptors:
        return f"Triton {device.triton} cannot pass TMA descriptors from the host; install triton>=3.6"
    if problem.dtype.itemsize == 4 and not device.interpreted:
        return "float32 is computed in IEEE arithmetic, which the tensor cores behind TMA tiles do not have"
    halves = problem.activation.gated and problem.gate_up_layout == "concatenated"
    for name, strides, address, rows, split in (
        ("w1", problem.w1_strides, problem.w1_address, problem.w1_rows, halves),
        ("w2", problem.w2_strides, problem.w2_address, problem.hidden_size, False),
    ):
        if problem.scheme.quantized and strides[2] != 1:
            return f"{name} has strides {strides}, and a quantised weight needs contiguous rows for TMA"
        obstacle = _weight_obstacle(name, strides, address, problem.weight_dtype.itemsize, rows, split)
        if obstacle is not None:
            return obstacle
    return None


def _weight_obstacle(
    name: str, strides: tuple[int, ...], address: int, itemsize: int, rows: int, halves: bool
) -> str | None:
    expert, row, column = strides
    if address % _TMA_ALIGNMENT:
        return f"{name} starts {address % _TMA_ALIGNMENT} bytes past a multiple of 16"
    if column != 1 and row != 1:
        return f"{name} has strides {strides}, and TMA needs rows or columns that are contiguous"
    steps = {0: expert, 1 if column == 1 else 2: row if column == 1 else column}
    for dim, stride in steps.items():
        if stride * itemsize % _TMA_ALIGNMENT or stride <= 0:
            return f"{name}.stride({dim}) is {stride * itemsize} bytes, not a positive multiple of 16"
    if halves and column != 1 and rows // 2 * itemsize % _TMA_ALIGNMENT:
        return f"{name}'s up half starts {rows // 2 * itemsize} bytes into a column, not a multiple of 16"
    return None
