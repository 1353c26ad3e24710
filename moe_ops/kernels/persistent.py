"""The order of the tiles of persistent kernels, and how their programs keep to it together.

A step of the launch is one tile of each program. What the programs of a step share, rows and weights, should leave the
L2 once for many of them, and the L2 has no room for what they share unless they are at the same place at the same time.
They are not by themselves: some multiprocessors are a little faster than others, and over many tiles a tile faster.
Then each reads from memory what it could have shared (measured: docs/kernels.md). So the programs wait for each other,
after every stretch of their loads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Rows that a consumer multiplies: those of one wgmma.
CONSUMER_ROWS = gl.constexpr(64)
# K steps of a stretch.
STRETCH = gl.constexpr(16)
# How often a program asks whether the others are as far; each time takes the better part of a microsecond.
PATIENCE = gl.constexpr(64)
# Columns at a multiple of which a box may start: 16 bytes of 16 bits, or of 8.
_ALIGNED_COLUMNS = gl.constexpr(16)


@gluon.jit
def tile(step, num_m, NUM_N: gl.constexpr, GROUP_M: gl.constexpr):
    """The tile of this program's step: (number, row block, column block), row blocks fastest within GROUP_M of them.

    Programs of one step run neighbouring row blocks of neighbouring columns, side by side (`keep_step`), so that L2
    serves a line once for many of them. An order that breaks the step costs more in traffic than it can save.
    """
    number = step * gl.num_programs(0) + gl.program_id(0)
    width: gl.constexpr = GROUP_M * NUM_N
    first_m = (number // width) * GROUP_M
    # At least 1, for numbers past the last tile.
    group = gl.maximum(gl.minimum(num_m - first_m, GROUP_M), 1)
    return number, first_m + (number % width) % group, (number % width) // group


@gluon.jit
def existing(block_m, num_m):
    """A row block that can be read of: past the last one that one, and 0 without row blocks."""
    return gl.maximum(gl.minimum(block_m, num_m - 1), 0)


@gluon.jit
def expert_of(tile_experts_ptr, block_m, num_m):
    """The expert of a row block; past the last one that one's, and -1 without row blocks."""
    return gl.load(tile_experts_ptr + existing(block_m, num_m))


@gluon.jit
def routes_of(sorted_routes_ptr, row, num_rows, ROWS: gl.constexpr):
    """The routes of ROWS rows, for `used_rows`; past the last row those of the last ones. In each warp all of them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [gl.num_warps()], [0])
    first = gl.maximum(gl.minimum(row, num_rows - ROWS), 0)
    return gl.load(sorted_routes_ptr + first + gl.arange(0, ROWS, LAYOUT))


@gluon.jit
def used_rows(routes, num_routes):
    """How many rows of a row block have a route: the first ones, those behind them are padding."""
    return gl.sum((routes < num_routes).to(gl.int32), 0)


@gluon.jit
def first_column(block_n, N: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first column of out that a tile makes.

    The last tile ends with the last column and makes some of its neighbour's once more, the same to the bit: TMA takes
    longer to fill a box with zeros than to load it.
    """
    if N > BLOCK_N and N % _ALIGNED_COLUMNS == 0:
        return gl.minimum(block_n * BLOCK_N, N - BLOCK_N)
    else:
        return block_n * BLOCK_N


@gluon.jit
def keep_step(progress_ptr, expected, patient):
    """Waits until `expected` stretches have been loaded, those of all programs counted together; not for ever.

    Programs that are left to themselves drift apart by whole tiles, and what they share is then read from memory again
    for each of them. It is for speed alone: a program that runs when others do not gives up, and is no longer patient.
    """
    polls = 0
    while (polls < patient) & (gl.load(progress_ptr, volatile=True) < expected):
        polls += 1
    return gl.where(polls < patient, patient, 0)


@gluon.jit
def load_step(progress_ptr, index, patience, RINGS: gl.constexpr, EARLY_STEPS: gl.constexpr):
    """Before K step `index` of those that a program's ring loads: waits for the others, and tells them; `keep_step`.

    RINGS: of a program, which all count. EARLY_STEPS: before the end of a stretch at which it counts as loaded.
    """
    if progress_ptr is not None:
        if (index % STRETCH == 0) & (index > 0) & (patience > 0):
            patience = keep_step(progress_ptr, index // STRETCH * RINGS * gl.num_programs(0), patience)
        if index % STRETCH == STRETCH - 1 - EARLY_STEPS:
            gl.atomic_add(progress_ptr, 1, sem="relaxed")
    return patience
