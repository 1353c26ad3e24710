"""Routes sorted by expert, on the device: a stable counting sort whose result depends on no order of execution.

Every expert's routes follow each other in their own order and are padded to a multiple of BLOCK rows:

    position(r) = start[e] + |{r' < r : expert(r') = e}|,   start[e] = sum_{e' < e} ceil(count[e'] / BLOCK) * BLOCK

Few routes take one launch (`route_small_kernel`). Many take three launches: counts and ranks per chunk of routes
(`count_kernel`), a scan of each expert's counts over the chunks (`scan_kernel`), and the scatter (`scatter_kernel`).
Ids are range-checked at their own width before they are narrowed or used as an index; a route whose id (or mapped id)
is not an expert here is dropped: it counts as expert NUM_EXPERTS, which has no rows.
"""

import triton
import triton.language as tl

from moe_ops.kernels.compat import gdc_launch_dependents, gdc_wait


@triton.jit
def local_experts(ids_ptr, map_ptr, offsets, mask, num_ids, num_experts):
    """Local experts of some routes; num_experts for those that are dropped. Same shape as offsets, int32."""
    ids = tl.load(ids_ptr + offsets, mask=mask, other=-1)
    known = (ids >= 0) & (ids < num_ids)
    experts = tl.where(known, ids, 0).to(tl.int32)
    if map_ptr is not None:
        experts = tl.load(map_ptr + experts, mask=known, other=-1)
        known = known & (experts >= 0) & (experts < num_experts)
    return tl.where(known, experts, num_experts)


@triton.jit
def _starts(counts, BINS: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [BINS] -> padded counts and first rows of the experts; bins past the last expert have no rows."""
    padded = tl.where(tl.arange(0, BINS) < NUM_EXPERTS, (counts + BLOCK - 1) // BLOCK * BLOCK, 0)
    return padded, tl.cumsum(padded, 0) - padded


@triton.jit
def _write_tiles(first_tile, starts, padded, counts, tile_experts_ptr, sorted_routes_ptr, num_routes, max_tiles,
                 NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_POW2: tl.constexpr,
                 TILES: tl.constexpr):  # fmt: skip
    """Writes the experts of TILES row blocks and their padding rows; blocks past the last have expert -1, all padding.

    The rows written here and those the routes write are disjoint.
    """
    tiles = first_tile + tl.arange(0, TILES)
    ends = starts + padded
    experts = tl.sum((ends[None, :] <= (tiles * BLOCK)[:, None]).to(tl.int32), 1)  # [TILES]
    # Empty bins at the end make a block past the last expert count all of BINS.
    alive = experts < NUM_EXPERTS
    experts = tl.where(alive, experts, NUM_EXPERTS)
    in_range = tiles < max_tiles
    tl.store(tile_experts_ptr + tiles, tl.where(alive, experts, -1), mask=in_range)
    bins = tl.arange(0, BINS)
    filled = tl.sum(tl.where(bins[None, :] == experts[:, None], (starts + counts)[None, :], 0), 1)
    first_padding = tl.where(alive, filled, 0)
    offsets = tl.arange(0, BLOCK_POW2)
    rows = tiles[:, None] * BLOCK + offsets[None, :]  # [TILES, BLOCK_POW2]
    tl.store(sorted_routes_ptr + rows, tl.zeros_like(rows) + num_routes,
             mask=in_range[:, None] & (offsets < BLOCK)[None, :] & (rows >= first_padding[:, None]))  # fmt: skip


@triton.jit
def _lay_out(program, counts, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, zeroed_ptr, num_routes, max_tiles,
             NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_POW2: tl.constexpr,
             TILES: tl.constexpr, ZEROED: tl.constexpr):  # fmt: skip
    """A program's share of everything that the counts decide; returns the experts' first rows."""
    padded, starts = _starts(counts, BINS, NUM_EXPERTS, BLOCK)
    if program == 0:
        tl.store(num_padded_ptr, tl.sum(padded, 0))
        if zeroed_ptr is not None:
            tl.store(zeroed_ptr + tl.arange(0, ZEROED), tl.zeros((ZEROED,), tl.int32))
    if program * TILES < max_tiles:
        _write_tiles(program * TILES, starts, padded, counts, tile_experts_ptr, sorted_routes_ptr, num_routes,
                     max_tiles, NUM_EXPERTS, BINS, BLOCK, BLOCK_POW2, TILES)  # fmt: skip
    return starts


@triton.jit(do_not_specialize=["num_routes", "max_tiles", "num_ids"])
def route_small_kernel(
    ids_ptr, map_ptr, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, inverse_ptr, zeroed_ptr,
    num_routes, max_tiles, num_ids,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_POW2: tl.constexpr,
    ROUTES: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, ZEROED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sort of at most ROUTES routes in one launch: CHUNK routes and TILES row blocks a program.

    Every program counts all routes for itself, which is cheaper than to wait for a second launch.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    others = tl.arange(0, ROUTES)
    other_experts = local_experts(ids_ptr, map_ptr, others, others < num_routes, num_ids, NUM_EXPERTS)
    counts = tl.histogram(other_experts, BINS)
    starts = _lay_out(program, counts, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, zeroed_ptr, num_routes,
                      max_tiles, NUM_EXPERTS, BINS, BLOCK, BLOCK_POW2, TILES, ZEROED)  # fmt: skip
    routes = program * CHUNK + tl.arange(0, CHUNK)
    mask = routes < num_routes
    experts = local_experts(ids_ptr, map_ptr, routes, mask, num_ids, NUM_EXPERTS)
    earlier = (other_experts[None, :] == experts[:, None]) & (others[None, :] < routes[:, None])  # [CHUNK, ROUTES]
    kept = mask & (experts < NUM_EXPERTS)
    rows = tl.where(kept, tl.gather(starts, experts, 0) + tl.sum(earlier.to(tl.int32), 1), -1)
    tl.store(inverse_ptr + routes, rows, mask=mask)
    tl.store(sorted_routes_ptr + rows, routes, mask=kept)


@triton.jit(do_not_specialize=["num_routes", "num_chunks"])
def count_kernel(
    ids_ptr, map_ptr, chunk_counts_ptr, rank_ptr, num_routes, num_chunks, num_ids,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """chunk_counts[e, chunk] and every route's rank among the routes of its chunk and expert."""
    if PDL:
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    routes = chunk * CHUNK + local
    mask = routes < num_routes
    experts = local_experts(ids_ptr, map_ptr, routes, mask, num_ids, NUM_EXPERTS)
    earlier = (experts[None, :] == experts[:, None]) & (local[None, :] < local[:, None])
    tl.store(rank_ptr + routes, tl.sum(earlier.to(tl.int32), 1), mask=mask)
    bins = tl.arange(0, BINS)
    tl.store(chunk_counts_ptr + bins.to(tl.int64) * num_chunks + chunk, tl.histogram(experts, BINS),
             mask=bins < NUM_EXPERTS)  # fmt: skip


@triton.jit(do_not_specialize=["num_chunks"])
def scan_kernel(chunk_counts_ptr, counts_ptr, num_chunks, STEP: tl.constexpr, PDL: tl.constexpr):
    """Per expert: chunk counts -> routes in earlier chunks (in place), and the expert's total."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    base = chunk_counts_ptr + expert.to(tl.int64) * num_chunks
    total = tl.zeros((), tl.int32)
    for first in range(0, num_chunks, STEP):
        chunks = first + tl.arange(0, STEP)
        counts = tl.load(base + chunks, mask=chunks < num_chunks, other=0)
        tl.store(base + chunks, total + tl.cumsum(counts, 0) - counts, mask=chunks < num_chunks)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + expert, total)


@triton.jit(do_not_specialize=["num_routes", "num_chunks", "max_tiles"])
def scatter_kernel(
    ids_ptr, map_ptr, chunk_counts_ptr, counts_ptr, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, inverse_ptr,
    zeroed_ptr, num_routes, num_chunks, max_tiles, num_ids,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_POW2: tl.constexpr,
    CHUNK: tl.constexpr, TILES: tl.constexpr, ZEROED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of a chunk's routes (inverse holds their ranks), and the row blocks this program has to describe."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins, mask=bins < NUM_EXPERTS, other=0)
    starts = _lay_out(program, counts, sorted_routes_ptr, tile_experts_ptr, num_padded_ptr, zeroed_ptr, num_routes,
                      max_tiles, NUM_EXPERTS, BINS, BLOCK, BLOCK_POW2, TILES, ZEROED)  # fmt: skip
    routes = program * CHUNK + tl.arange(0, CHUNK)
    mask = routes < num_routes
    experts = local_experts(ids_ptr, map_ptr, routes, mask, num_ids, NUM_EXPERTS)
    kept = mask & (experts < NUM_EXPERTS)
    before = tl.load(chunk_counts_ptr + experts.to(tl.int64) * num_chunks + program, mask=kept, other=0)
    rank = tl.load(inverse_ptr + routes, mask=mask, other=0)
    rows = tl.where(kept, tl.gather(starts, experts, 0) + before + rank, -1)
    tl.store(inverse_ptr + routes, rows, mask=mask)
    tl.store(sorted_routes_ptr + rows, routes, mask=kept)
