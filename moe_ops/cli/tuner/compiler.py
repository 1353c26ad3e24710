"""The process that compiles candidates and never touches a device, so that others can be timed meanwhile.

What it compiles lies in Triton's cache on disk, where the process that launches it finds it.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from triton.runtime import driver

from moe_ops.aot.compiler import compile_for
from moe_ops.aot.recording import Launch, Operand, Recording, contiguous_strides
from moe_ops.arguments import TENSOR_ARGUMENTS
from moe_ops.cli.tuner.calls import PARTS, Call, tiles_from_json
from moe_ops.cli.tuner.serving import Send, serve
from moe_ops.devices import Device
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.testing import override
from moe_ops.tuning.table import Tiles

# What is timed comes first where there are too few CPUs.
_NICENESS = 5


def main(connection, log: str | None, device: dict) -> None:
    """Answers requests until the other end is closed.

    Args:
        connection: to the pool.
        log: file for what compilers print; None for nowhere.
        device: facts of the one to compile for, as `worker.Engine.hello` gives them.
    """
    os.nice(_NICENESS)
    serve(connection, log, lambda: Compiler(Device(**{**device, "capability": tuple(device["capability"])})))


class Compiler:
    """Compiles the kernels of calls."""

    def __init__(self, device: Device) -> None:
        """Prepares nothing yet."""
        self._device = device

    def hello(self) -> dict:
        """Nothing of interest."""
        return {}

    def broken(self) -> bool:
        """Never: a compiler that fails leaves nothing behind."""
        return False

    def answer(self, request: Mapping, send: Send) -> object:
        """Compiles one of `PARTS` of a call with a candidate's tiles; returns how many kernels that was."""
        send({"event": "begin", "index": 0})
        (tiles,) = (tiles_from_json(value) for value in request["candidates"])
        launches = recorded(Call.from_json(request["call"]), tiles, self._device)[request["part"]]
        major, minor = self._device.capability
        for launch in launches:
            compiled = compile_for(launch, 10 * major + minor)
            if torch.cuda.is_available():
                # Older versions of Triton have a launcher in C for each signature, which takes a compiler too.
                driver.active.launcher_cls(compiled.src, compiled.metadata)
        return len(launches)


def recorded(call: Call, tiles: Tiles, device: Device) -> dict[str, list[Launch]]:
    """What a call launches, by `PARTS`.

    Args:
        call: the call, on one of the paths of the GPU.
        tiles: its tiles.
        device: where it would run.

    Raises:
        ValueError: it cannot run so; the message says why.
    """
    args = call.arguments()
    problem = make_problem(args, traced=True)
    with override(path=call.path, variant=tiles.variant, config=(tiles.up, tiles.down)):
        plan = make_plan(problem, device)
    recording = Recording()
    operands = {
        name: Operand(name, tuple(tensor.shape), tensor.stride(), tensor.dtype, recording.allocate)
        for name, tensor in args.tensors().items()
    }
    described = replace(args, **{name: operands.get(name) for name in TENSOR_ARGUMENTS})
    shape = problem.out_shape
    out = Operand("out", shape, contiguous_strides(shape), problem.out_dtype, recording.allocate)
    parts: dict[str, list[Launch]] = {name: [] for name in PARTS}
    backend = importlib.import_module(f"moe_ops.backends.{plan.path}")
    before = 0
    for stage in backend.stages(described, problem, replace(plan, kernels=recording), out):
        parts[stage if stage in parts else "other"] += recording.launches[before:]
        before = len(recording.launches)
    return parts
