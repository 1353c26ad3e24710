"""Which tiles are worth a try: the heuristic's, each with one thing changed, and then the best changes together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from moe_ops.cli.known import like
from moe_ops.cli.limits import expected_work
from moe_ops.cli.tuner.calls import MOST_DIRECT_TOKENS
from moe_ops.devices import Device
from moe_ops.problem import Problem
from moe_ops.tuning import TileConfig, tile_configs, variant_obstacle
from moe_ops.tuning.heuristics import row_group
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import Tiles
from moe_ops.tuning.variants import expected_rows

_GROUPS, _SORTED_GROUPS = (1, 4, 8, 16, 32), (1, 8, 32)
# Numbers of tokens, as factors, whose tiles may suit this one: rows an expert are an estimate, and never even.
_FACTORS = (0.25, 0.5, 2, 4)
# Rows an expert from which the persistent kernels may pay.
_FEWEST_PERSISTENT_ROWS = 12
# Rows an expert up to which the general kernel may beat the persistent ones, and rows of a block that may be swapped.
_MOST_SORTED_ROWS, _MOST_SWAPPED = 512, 64
# Rows an expert up to which the kernel for packed weights may be ahead.
_MOST_PACKED_ROWS = 64
# A candidate whose least time, padding included, is so much above the heuristic's is not worth compiling.
_HOPELESS = 1.5
# Of the best candidates, and of the second wave at most.
_COMBINED, _MOST_SECOND = 3, 16


def first_wave(problem: Problem, device: Device, path: str) -> list[Tiles]:
    """The heuristic's tiles, other variants, tiles of other numbers of tokens, and one change of each kind.

    Args:
        problem: the call.
        device: where it runs.
        path: "tma" or "classic".

    Returns:
        Tiles that fit the device and may be fast, none twice; the heuristic's are the first.
    """
    own = heuristic_tiles(problem, device, path)
    others = [*_other_variants(problem, device, path, own), *_other_rows(problem, device, path)]
    changed = [Tiles(own.variant, up, own.down) for up in _neighbours(own.variant, own.up, device)]
    changed += [Tiles(own.variant, own.up, down) for down in _neighbours(own.variant, own.down, device)]
    return _promising(fitting([own, *others, *changed], problem, device, path), problem, device)


def second_wave(
    problem: Problem, device: Device, path: str, ranked: Sequence[Tiles], tried: Iterable[Tiles]
) -> list[Tiles]:
    """The up tiles of the best candidates with the down tiles of the best: the two GEMMs run one after the other.

    Args:
        problem: the call.
        device: where it runs.
        path: "tma" or "classic".
        ranked: what was timed, the fastest first.
        tried: what need not be tried again.

    Returns:
        New tiles that fit the device.
    """
    if not ranked:
        return []
    best = ranked[0]
    kin = [t for t in ranked if t.variant == best.variant and t.up.block_m == best.up.block_m]
    ups, downs = (list(dict.fromkeys(getattr(t, name) for t in kin))[:_COMBINED] for name in ("up", "down"))
    combined = [Tiles(best.variant, up, down) for up in ups for down in downs]
    # And a step further along from the best one.
    combined += [Tiles(best.variant, up, best.down) for up in _neighbours(best.variant, best.up, device)]
    combined += [Tiles(best.variant, best.up, down) for down in _neighbours(best.variant, best.down, device)]
    done = set(tried)
    return [t for t in fitting(combined, problem, device, path) if t not in done][:_MOST_SECOND]


def fitting(tiles: Iterable[Tiles], problem: Problem, device: Device, path: str) -> list[Tiles]:
    """Those tiles that fit the device, none twice."""

    def fits(t: Tiles) -> bool:
        return tuned_obstacle(problem, device, path, t.variant, t.up, t.down) is None

    return [t for t in dict.fromkeys(tiles) if fits(t)]


def _promising(tiles: list[Tiles], problem: Problem, device: Device) -> list[Tiles]:
    """Those whose padding does not make them hopeless beside the first, at the ceilings of the device's data sheet."""
    card = like(device.name)
    if card is None:
        return tiles
    work, scheme = expected_work(problem), problem.scheme
    rates = card.rates(multiplies_bytes=scheme.row_dtype is not None)
    least = [work.limit(rates, work.padded_rows(t.up.block_m))[0] for t in tiles]
    return [t for t, ms in zip(tiles, least, strict=True) if ms <= _HOPELESS * least[0]]


def _other_variants(problem: Problem, device: Device, path: str, own: Tiles) -> Iterator[Tiles]:
    rows = expected_rows(problem)
    plausible = {
        "direct": problem.num_tokens <= MOST_DIRECT_TOKENS,
        "sorted": rows <= _MOST_SORTED_ROWS,
        "pingpong": rows >= _FEWEST_PERSISTENT_ROWS,
        "blockscaled": rows >= _FEWEST_PERSISTENT_ROWS,
        "packed": rows <= _MOST_PACKED_ROWS,
        "mixed": rows >= _FEWEST_PERSISTENT_ROWS,
    }
    for variant, worth_it in plausible.items():
        if variant != own.variant and worth_it and variant_obstacle(variant, problem, device, path) is None:
            yield Tiles(variant, *tile_configs(problem, device, path, variant, batch_invariant=False))


def _other_rows(problem: Problem, device: Device, path: str) -> Iterator[Tiles]:
    for factor in _FACTORS:
        tokens = round(problem.num_tokens * factor)
        other = heuristic_tiles(replace(problem, num_tokens=max(2, tokens)), device, path)
        if other.variant == "sorted" or problem.num_tokens > MOST_DIRECT_TOKENS:
            yield other


def _neighbours(variant: str, tile: TileConfig, device: Device) -> Iterator[TileConfig]:
    """A tile with one thing changed: of the kinds that a variant leaves open."""
    if variant in ("pingpong", "blockscaled", "mixed"):
        changes = [{"group_m": group} for group in dict.fromkeys((*_GROUPS, row_group(device.num_sms)))]
    elif variant == "packed":
        changes = [
            *({"num_stages": stages} for stages in (tile.num_stages - 1, tile.num_stages + 1)),
            *({"group_m": group} for group in _SORTED_GROUPS),
        ]
    elif variant == "direct":
        changes = [
            *({"block_n": n} for n in _halved_and_doubled(tile.block_n)),
            *({"block_k": k} for k in _halved_and_doubled(tile.block_k)),
            *({"num_warps": warps} for warps in (1, 2, 4, 8)),
        ]
    else:
        changes = [
            *({"block_n": n} for n in _halved_and_doubled(tile.block_n)),
            *({"block_k": k} for k in _halved_and_doubled(tile.block_k)),
            *({"num_stages": stages} for stages in (tile.num_stages - 1, tile.num_stages + 1, tile.num_stages + 2)),
            *({"num_warps": warps} for warps in (4, 8)),
            *({"group_m": group} for group in _SORTED_GROUPS),
        ]
        if tile.block_m <= _MOST_SWAPPED:
            changes.append({"swap_ab": not tile.swap_ab})
    for change in changes:
        try:
            changed = replace(tile, **change)
        except ValueError:  # outside of what a tile may be
            continue
        if changed != tile:
            yield changed


def _halved_and_doubled(value: int) -> tuple[int, int]:
    return value // 2, value * 2
