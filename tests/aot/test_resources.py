"""Ahead of time, without a GPU: what every kernel variant takes of a multiprocessor, and that nothing of it spills.

A multiprocessor has 64 Ki registers and, on sm_90, 228 KiB of shared memory, 227 KiB of them for one program and 1 KiB
taken by each. How many programs share it is part of a tile's design: a bound stands where one fewer would fit, or, for
kernels of one program, short of the 255 registers at which the assembler spills.
"""

import functools
import re
from typing import NamedTuple

import pytest

pytest.importorskip("triton.experimental.gluon")

from moe_ops.backends import classic, tma
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from tests.aot.harness import DEVICES, KIB, Compiled, compiling, make_call, report
from tests.gpu.repeats import CASES

REGISTERS, SHARED_MEMORY = 64 * KIB, 228 * KIB
SIZES = {"experts": 16, "hidden": 2048, "intermediate": 768}


class Bound(NamedTuple):
    """Of a kernel, at most: registers a thread, threads a program; and programs a multiprocessor must have room for."""

    registers: int
    threads: int
    programs: int


# By case; the kernels beside the two GEMMs are the same for all.
GEMMS = {
    # A wgmma of 64 rows of weights leaves most registers free; the ring of TMA boxes decides: two programs.
    "sorted-swapped-tma": {"up_kernel": Bound(168, 128, 2), "down_kernel": Bound(64, 128, 2)},
    # Half of the registers are the accumulator (128 x 256 in 256 threads), the stages fill the shared memory.
    "sorted-large-tma": {"up_kernel": Bound(248, 256, 1), "down_kernel": Bound(224, 256, 1)},
    # Without TMA, programs in flight are what covers the memory's latency: three of four warps, two of eight.
    "sorted-few-classic": {"up_kernel": Bound(128, 128, 3), "down_kernel": Bound(128, 128, 3)},
    "sorted-large-classic": {"up_kernel": Bound(128, 256, 2), "down_kernel": Bound(128, 256, 2)},
    # 12 warps of 168 are the register file but for a part that setmaxnreg cannot use.
    "pingpong": {"pingpong_kernel": Bound(168, 384, 1)},
    # 20 warps of a multiprocessor keep the memory busy.
    "direct": {"gemv_up_kernel": Bound(96, 128, 5), "gemv_down_kernel": Bound(96, 128, 5)},
}
# Kernels of microseconds, a program or a few on each multiprocessor; the widest sort has the most registers.
BESIDE = {
    "route_small_kernel": Bound(128, 128, 4),
    "count_kernel": Bound(168, 128, 3),
    "scan_kernel": Bound(128, 128, 4),
    "scatter_kernel": Bound(128, 128, 4),
    # A stream of rows: half of the threads that there can be.
    "combine_kernel": Bound(64, 128, 8),
}


@functools.cache
def compile_case(name: str, arch: int, top_k: int = 2) -> tuple[Compiled, ...]:
    """The kernels of a case in the order of their launches: up and down apart even where one kernel serves both."""
    args = make_call(CASES[name].tokens[0], top_k=top_k, **SIZES)
    problem = make_problem(args)
    with CASES[name].override():
        plan = make_plan(problem, DEVICES[arch])
    out = args.hidden_states.new_empty(problem.out_shape)
    with compiling(arch) as launches:
        {"tma": tma, "classic": classic}[plan.path].run(args, problem, plan, out)
    return tuple(report(fn.__name__, kernel) for fn, kernel in launches)


def threads(kernel: Compiled) -> int:
    """Threads of a program."""
    return int(re.search(r"\.reqntid (\d+)", kernel.ptx).group(1))


@pytest.mark.parametrize(("name", "top_k"), [*((name, 2) for name in CASES), ("direct", 8)])
def test_hopper(name, top_k):
    kernels = compile_case(name, 90, top_k)
    for kernel in kernels:
        bound = BESIDE.get(kernel.name) or GEMMS.get(name, {}).get(kernel.name)
        assert kernel.spills == 0, kernel.name
        assert not kernel.serialized, kernel.name
        assert 0 < kernel.registers <= bound.registers, kernel.name
        assert threads(kernel) <= bound.threads, kernel.name
        assert kernel.shared_memory <= min(227 * KIB, SHARED_MEMORY // bound.programs - KIB), kernel.name
    assert GEMMS.get(name, {}).keys() <= {kernel.name for kernel in kernels}


def test_bounds_leave_room_for_the_programs():
    """Registers are given out to warps, in units of 8 a thread: the bounds themselves must fit."""
    for bound in (*BESIDE.values(), *(bound for bounds in GEMMS.values() for bound in bounds.values())):
        assert bound.registers % 8 == 0
        assert bound.registers * bound.threads * bound.programs <= REGISTERS
        assert bound.threads * bound.programs <= 2048


@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("name", ["sorted-large-classic", "direct"])
def test_others_do_not_spill(name, arch):
    """The classic path is all that every GPU from sm_80 on can take; test_compile.py has sm_80."""
    for kernel in compile_case(name, arch):
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_memory <= DEVICES[arch].shared_memory
