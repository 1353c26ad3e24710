"""Compiles the kernels a call would launch, for any NVIDIA architecture, on a machine without a GPU.

The backends run unchanged on CPU tensors; a stand-in driver names the target and every launch becomes a compilation
(`JITFunction.warmup`). What is checked is therefore what ships: grids, arguments and descriptors included.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_ops.aot.compiler import TargetDriver
from moe_ops.devices import Device
from moe_ops.dispatch import make_plan
from moe_ops.problem import Arguments, make_problem
from moe_ops.tuning.files import write_atomically

KIB = 1024
DEVICES = {
    80: Device("cuda", "A100", (8, 0), 108, 163 * KIB, triton.__version__, True),
    89: Device("cuda", "RTX 4090", (8, 9), 128, 99 * KIB, triton.__version__, True),
    90: Device("cuda", "H200", (9, 0), 132, 227 * KIB, triton.__version__, True),
    100: Device("cuda", "B200", (10, 0), 148, 227 * KIB, triton.__version__, True),
    120: Device("cuda", "RTX 5090", (12, 0), 170, 99 * KIB, triton.__version__, True),
}
# A cache for the run, whose processes share it (conftest.py names it), and in it the reports of Triton's assembler by
# the kernels' hashes: every Triton has options of its own for the assembler, which assembling here would not have, and
# a kernel from an older cache has no report.
cache = Path()


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: of the kernel.
        ptx: its code.
        shared_memory: bytes.
        spills: bytes stored to and loaded from local memory for want of registers.
        registers: of a thread when the kernel starts.
        serialized: the assembler made every wgmma wait for the one before, which costs most of their speed.
    """

    name: str
    ptx: str
    shared_memory: int
    spills: int
    registers: int
    serialized: bool

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the PTX."""
        return self.ptx.count(instruction)


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Within the block every launch compiles for sm_<arch> and is added to the list instead of running."""
    launches = []
    previous_driver, previous_getitem = driver._active, JITFunction.__getitem__

    def getitem(self, grid):
        def launch(*args, **kwargs):
            with redirect_stdout(io.StringIO()) as log:
                kernel = self.warmup(*args, grid=grid, **kwargs)
                if not log.getvalue() and not _report_of(kernel).exists():
                    # Another process has just put the kernel into the cache, and not yet the report.
                    self.device_caches.clear()
                    with knobs.compilation.scope():
                        knobs.compilation.always_compile = True
                        kernel = self.warmup(*args, grid=grid, **kwargs)
            if log.getvalue():
                write_atomically(_report_of(kernel), log.getvalue())
            launches.append((self, kernel))

        return launch

    # Kernels are cached per device number, and every architecture here is device 0.
    _forget_kernels()
    driver.set_active(TargetDriver(arch))
    JITFunction.__getitem__ = getitem
    try:
        with knobs.nvidia.scope(), knobs.cache.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.cache.dir = str(cache)
            yield launches
    finally:
        JITFunction.__getitem__ = previous_getitem
        driver._active = previous_driver
        _forget_kernels()


def _report_of(kernel) -> Path:
    return cache / f"{kernel.hash}.log"


def _forget_kernels() -> None:
    from moe_ops.kernels import (
        blockscaled,
        combine,
        exchange,
        gemv,
        grouped_gemm,
        mixed,
        packed,
        pingpong,
        planes,
        quantize,
        route,
        topk,
    )

    for module in (
        blockscaled, combine, exchange, gemv, grouped_gemm, mixed, packed, pingpong, planes, quantize, route, topk
    ):  # fmt: skip
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def compile_call(args: Arguments, arch: int) -> dict[str, Compiled]:
    """Compiles every kernel of a call for sm_<arch>; the plan is the one dispatch makes for such a device."""
    problem = make_problem(args)
    plan = make_plan(problem, DEVICES[arch])
    from moe_ops.backends import classic, tma

    out = args.hidden_states.new_empty(problem.out_shape, dtype=problem.out_dtype)
    with compiling(arch) as launches:
        {"tma": tma, "classic": classic}[plan.path].run(args, problem, plan, out)
    return {fn.__name__: report(fn.__name__, kernel) for fn, kernel in launches}


def report(name: str, kernel) -> Compiled:
    """What there is to know about a kernel from its code and from the assembler."""
    ptx = kernel.asm["ptx"]
    log = _report_of(kernel).read_text()
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    return Compiled(name, ptx, kernel.metadata.shared, spills, registers, "instructions are serialized" in log)


def make_call(num_tokens=64, hidden=512, intermediate=256, experts=8, top_k=2, dtype=torch.bfloat16, **options):
    """A call whose tensors have only shapes that matter.

    Its own options: `n_major=True` and `bias=True`; `fp8`, the shape of the scales of fp8 weights: "tensor", "channel"
    or "block"; their `weight_dtype`; and `act_scales`, how many given scales of the activation there are.
    """
    n_major = options.pop("n_major", False)
    bias = options.pop("bias", False)
    fp8 = options.pop("fp8", None)
    weight_dtype = options.pop("weight_dtype", dtype if fp8 is None else torch.float8_e4m3fn)
    act_scales = options.pop("act_scales", 0)
    rows = intermediate if options.get("activation", "silu").endswith("_no_gate") else 2 * intermediate
    w1 = torch.zeros(experts, rows, hidden, dtype=weight_dtype)
    w2 = torch.zeros(experts, hidden, intermediate, dtype=weight_dtype)
    if fp8 is not None:
        options |= {"quantization": "fp8_w8a8", "block_shape": [128, 128] if fp8 == "block" else None}
        options |= {f"{name}_scale": _scale(weight, fp8) for name, weight in (("w1", w1), ("w2", w2))}
    if act_scales:
        options["a2_scale"] = torch.zeros(act_scales)
    if n_major:
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    return Arguments(
        torch.zeros(num_tokens, hidden, dtype=dtype),
        w1,
        w2,
        torch.zeros(num_tokens, top_k),
        torch.zeros(num_tokens, top_k, dtype=torch.int32),
        torch.zeros(experts, rows, dtype=dtype) if bias else None,
        torch.zeros(experts, hidden) if bias else None,
        **options,
    )


def _scale(weight: torch.Tensor, granularity: str) -> torch.Tensor:
    experts, rows, columns = weight.shape
    shapes = {"tensor": (), "channel": (rows,), "block": (-(-rows // 128), -(-columns // 128))}
    return torch.zeros(experts, *shapes[granularity])
