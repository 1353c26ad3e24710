"""Hopper's kernels without a Hopper: the warp-specialised kernels in Gluon, run in Python on tensors of the CPU."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_ops import devices, plans
from moe_ops.devices import Device


@dataclass
class Launches:
    """What was run: a clean run that ran nothing proves nothing.

    Attributes:
        programs: of each kernel, by its name.
    """

    programs: Counter[str] = field(default_factory=Counter)


def describe_hopper(num_sms: int = 2) -> Device:
    """The CPU as a Hopper GPU with so many multiprocessors, whose other kernels Triton interprets."""
    cpu = devices.describe(torch.device("cpu"))
    return replace(cpu, kind="cuda", name="emulated Hopper", capability=(9, 0), num_sms=num_sms)


@contextlib.contextmanager
def hopper(num_sms: int = 2, seed: int = 0) -> Iterator[Launches]:
    """Describes the CPU as a Hopper GPU in the block, and runs the kernels in Gluon for it in Python.

    The other kernels run in Triton's interpreter. Roles of a program take turns, and copies arrive, in an order drawn
    from the seed; races, missing fences and deadlocks are found whatever the numbers, see `testing.hopper.machine`. Not
    seen are numbers that depend on a layout, mistakes of the compiler, and what several programs do to each other: they
    run one after the other. Not for several threads at a time.

    Args:
        num_sms: multiprocessors, which is how many programs persistent kernels have.
        seed: of the order.

    Returns:
        What has been run; filled as kernels run.

    Raises:
        RuntimeError: Triton does not interpret: TRITON_INTERPRET=1 was not set when it was imported.
        HopperError: by the calls in the block: a kernel has a fault.

    Example:
        >>> from moe_ops.testing import override
        >>> from moe_ops.testing.hopper import hopper
        >>> with hopper() as launches, override(variant="pingpong"):  # doctest: +SKIP
        ...     moe_ops.fused_moe(x, w1, w2, topk_weights, topk_ids)
        >>> launches.programs["pingpong_kernel"]  # doctest: +SKIP
        4
    """
    import triton
    from triton.experimental.gluon._runtime import GluonJITFunction

    from moe_ops.backends import launch
    from moe_ops.testing.hopper.language import Language
    from moe_ops.testing.hopper.machine import Machine
    from moe_ops.testing.hopper.values import Descriptor, Pointer

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles here: set TRITON_INTERPRET=1 before the process starts")
    launches, device = Launches(), describe_hopper(num_sms)

    def argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer.of(value)
        return Descriptor(value) if hasattr(value, "block_shape") else value

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool = False, **options: Any) -> None:
        given = [argument(value) for value in args]
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        for program in range(grid[0]):
            launches.programs[kernel.fn.__name__] += 1
            machine = Machine(program, grid[0], seed, options["num_warps"])
            Language(machine).function(kernel)(*given, **named)
            machine.finish()

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GluonJITFunction, "run", run))
        stack.enter_context(mock.patch.object(plans, "describe", lambda _: device))
        stack.enter_context(mock.patch.object(launch, "settle_key", lambda _: None))
        yield launches
