"""What differs between the Triton versions that are supported (3.6 and later), behind one name each."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh from exp, which unlike the vendor's tanh also runs in the interpreter; exact at both ends."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)
