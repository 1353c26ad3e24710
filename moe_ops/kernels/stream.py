"""A read of memory and nothing else: the ceiling that bandwidth-bound kernels are measured against."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reads n elements once; writes a value only if one of them is NaN, so that the read is not optimised away."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        total += tl.load(x_ptr + first + tl.arange(0, BLOCK))
    total = tl.sum(total, 0)
    if total != total:
        tl.store(out_ptr, total)
