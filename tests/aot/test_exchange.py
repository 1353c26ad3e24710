"""The kernels of expert parallelism, compiled for every architecture: no spills, and rows move 16 bytes at a time."""

import pytest
import torch

from moe_ops.backends.exchange import combine_rows, halve_rows, pack_rows, place_rows, sum_ranks
from moe_ops.exchange import RowLayout, half_bytes
from tests.amount import in_full
from tests.aot.harness import DEVICES, compiling, report

RANKS, TOP_K, HIDDEN = 4, 8, 7168
QUANTIZED = {"plain": (torch.bfloat16, 0), "group": (torch.float8_e4m3fn, 56), "token": (torch.float8_e4m3fn, 1)}


def compiled_for(arch, launch):
    with compiling(arch) as launches:
        launch()
    return {function.__name__: report(function.__name__, kernel) for function, kernel in launches}


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == 90 else in_full) for arch in DEVICES])
@pytest.mark.parametrize("form", QUANTIZED)
def test_pack_compiles(form, arch):
    dtype, scales = QUANTIZED[form]
    if dtype == torch.float8_e4m3fn and arch < 89:
        pytest.skip("fp8 needs compute capability 8.9")
    tokens = 32
    x, weights = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16), torch.empty(tokens, TOP_K)
    places = torch.empty(tokens, TOP_K, dtype=torch.int32)
    counts = torch.empty(RANKS, dtype=torch.int32)
    kernels = compiled_for(
        arch,
        lambda: pack_rows(x, None, weights, places, places, places, counts, RANKS * 32, 64, 32, dtype, scales),
    )
    pack = kernels["pack_kernel"]
    assert pack.spills == 0, pack
    assert pack.count("ld.global.v4") or pack.count("ld.global.L1::no_allocate.v4") or "v4.b32" in pack.ptx
    assert RowLayout(HIDDEN, TOP_K, dtype, scales).row_bytes % 128 == 0


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == 90 else in_full) for arch in DEVICES])
def test_place_and_combine_compile(arch):
    ids = torch.zeros(1024, TOP_K, dtype=torch.int64)  # above what is sorted in one launch
    table = torch.zeros(256, dtype=torch.int32)
    kernels = compiled_for(arch, lambda: place_rows(ids, table, table, RANKS, 512))
    back, rows = torch.empty(RANKS * 512, HIDDEN), torch.empty(1024, TOP_K, dtype=torch.int32)
    kernels |= compiled_for(arch, lambda: combine_rows(back, rows, HIDDEN, torch.bfloat16))
    assert {"first_slots_kernel", "spread_kernel", "sum_kernel", "scatter_kernel"} <= set(kernels)
    assert all(kernel.spills == 0 for kernel in kernels.values())
    assert "v4.b32" in kernels["sum_kernel"].ptx


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == 90 else in_full) for arch in DEVICES])
def test_halves_compile(arch):
    partial = torch.empty(512, HIDDEN)
    back = torch.empty(512 * (RANKS - 1), half_bytes(HIDDEN), dtype=torch.uint8)
    kernels = compiled_for(arch, lambda: halve_rows(partial, 128, 128))
    kernels |= compiled_for(arch, lambda: sum_ranks(partial, back, 1, torch.bfloat16))
    assert {"halve_kernel", "sum_kernel"} == set(kernels)
    for kernel in kernels.values():
        assert kernel.spills == 0 and kernel.count("global.v4.b32") and not kernel.count("global.b16"), kernel
