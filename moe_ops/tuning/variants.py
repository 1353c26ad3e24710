"""Kernel variants: when each can run, when it is the best, and the ping-pong kernel's tiles."""

from dataclasses import replace

from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.tuning.config import TileConfig

# First Triton whose Gluon the kernel is written for.
_FIRST_TRITON = (3, 6)
_COPY_ELEMENTS = 8


# As `Plan.variant`.
VARIANTS = ("direct", "sorted", "pingpong")

# Rows an expert can expect above which the ping-pong kernel is ahead; later where the down GEMM's reduction is short
# and its ring is refilled for every tile. Measured on an H200, see docs/kernels.md.
_PINGPONG_ROWS = 64
_PINGPONG_ROWS_SHORT, _SHORT_REDUCTION = 128, 512


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
    if problem.num_tokens == 1 and problem.w1_strides[2] == 1 == problem.w2_strides[2]:
        return "direct"
    short = problem.intermediate_size <= _SHORT_REDUCTION
    least = _PINGPONG_ROWS_SHORT if short else _PINGPONG_ROWS
    if expected_rows(problem) > least and variant_obstacle("pingpong", problem, device, path) is None:
        return "pingpong"
    return "sorted"


def variant_obstacle(variant: str, problem: Problem, device: Device, path: str) -> str | None:
    """Why a variant cannot run a call on a path; None if it can."""
    if variant != "pingpong":
        return None
    if path != "tma":
        return f"it needs the TMA path, and this call takes {path!r}"
    return pingpong_obstacle(problem, device)


def pingpong_obstacle(problem: Problem, device: Device) -> str | None:
    """Why the ping-pong kernel cannot run a call on the TMA path; None if it can.

    What keeps a call from the TMA path at all is `dispatch.tma_obstacle`'s to say, and taken as checked.
    """
    if device.interpreted or device.kind != "cuda" or device.capability is None:
        return "it is written in Gluon for NVIDIA GPUs, and Gluon has no interpreter"
    if device.capability[0] != 9:
        major, minor = device.capability
        return f"{device.name or 'the device'} has compute capability {major}.{minor}, and wgmma is 9.x alone"
    if device.triton is None or _version(device.triton) < _FIRST_TRITON:
        return f"Triton is {device.triton}, and its Gluon is needed from 3.6 on"
    if problem.dtype.itemsize != 2:
        return f"the GEMMs are in {problem.dtype}, and it computes in bfloat16 and float16"
    if problem.hidden_size % _COPY_ELEMENTS:
        return f"H is {problem.hidden_size}, not a multiple of 8: rows of hidden_states cannot be copied by 16 bytes"
    return None


def pingpong_tiles(problem: Problem) -> tuple[TileConfig, TileConfig]:
    """(up, down): 64 rows and 256 rows of weights, two consumers of 4 warps, and the stages that then fit."""
    down = TileConfig(block_m=64, block_n=256, block_k=64, group_m=16, num_warps=4, num_stages=5)
    up = TileConfig(block_m=64, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=5)
    return (up if problem.activation.gated else down), down


def pingpong_tiles_obstacle(problem: Problem, up: TileConfig, down: TileConfig) -> str | None:
    """Why the ping-pong kernel cannot have such tiles; None if it can."""
    for name, tile, own in zip(("up", "down"), (up, down), pingpong_tiles(problem), strict=True):
        if replace(tile, group_m=own.group_m, num_stages=own.num_stages) != own:
            return f"{name} is {tile}, and variant 'pingpong' has {own}; only group_m and num_stages may differ"
    return None


def _version(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
