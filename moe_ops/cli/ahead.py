"""Kernels of calls compiled before the calls are made, in processes side by side: one alone compiles one by one."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from moe_ops.cli.calls import Sizes
from moe_ops.cli.tuner.calls import PARTS, Call, part_key, tiles_to_json
from moe_ops.cli.tuner.pool import Answer, Pool, PoolError
from moe_ops.devices import Device
from moe_ops.dispatch import Override, choose_path, make_plan, override
from moe_ops.tuning import VARIANTS
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles

MOST_WORKERS = 24
# Fewer kernels are compiled where they are launched before a worker has imported what it needs.
_FEW = 4
_LIMIT_SECONDS = 120
_LANE = "compile"


@dataclass
class Ahead:
    """What came of compiling ahead.

    Attributes:
        kernels: that the calls launch, each once.
        missing: those of them that Triton's cache lacked.
        errors: why some were not compiled; the call that launches one then says so itself.
        workers: processes that compiled, at most; 0 where nothing was left to them.
        seconds: that all of it took.
    """

    kernels: int = 0
    missing: int = 0
    errors: list[str] = field(default_factory=list)
    workers: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.workers:
            return f"kernels: {self.kernels}, of which Triton's cache lacks {self.missing}"
        failed = f", {len(self.errors)} of them in vain: {self.errors[0]}" if self.errors else ""
        return f"kernels: {self.missing} of {self.kernels} compiled in {self.seconds:.0f} s{failed}"


def default_workers() -> int:
    """As many processes as there are CPUs: nothing else goes on meanwhile."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


def planned(
    shapes: Iterable[Sizes], tokens: Sequence[int], dtype: str, form: str, variants: Iterable[str], device: Device
) -> Iterator[tuple[Call, Tiles]]:
    """Calls as `bench` makes them, with the tiles that they get, and without those that cannot run.

    Args:
        shapes: (E, top_k, H, I) of each.
        tokens: numbers of tokens.
        dtype: "bfloat16" or "float16".
        form: of the weights, as `Call.format`.
        variants: of `moe_ops.cli.measure.OURS`, and "auto", the path that the op takes.
        device: where the calls will run.
    """
    for sizes in shapes:
        for count in tokens:
            for name in variants:
                call = Call(sizes, count, dtype, form, name if name in ("tma", "classic") else "auto")
                try:
                    problem = call.problem()
                    path, _ = choose_path(problem, device)
                    if path not in ("tma", "classic"):
                        continue
                    with override(Override(variant=name if name in VARIANTS else None)):
                        plan = make_plan(problem, device)
                except ValueError:  # the cell of that call says it
                    continue
                own = name == "heuristic"
                tiles = heuristic_tiles(problem, device, path) if own else Tiles(plan.variant, plan.up, plan.down)
                yield Call(sizes, count, dtype, form, path), tiles


def compile_ahead(
    calls: Iterable[tuple[Call, Tiles]],
    device: Device,
    workers: int,
    step: Callable[[int, int], None] = lambda done, all_parts: None,
) -> Ahead:
    """Fills Triton's cache with what calls launch. Where it has everything, that takes a second for some hundred calls.

    Args:
        calls: with their tiles.
        device: where they will run.
        workers: processes at most.
        step: called with (parts of calls that were compiled, all that are to be) as they are.

    Returns:
        What came of it. Nothing is raised: what is not compiled here is compiled where it is launched.
    """
    start, result = time.monotonic(), Ahead()
    requests = _missing(calls, device, result) if device.capability is not None and not device.interpreted else []
    if result.missing >= _FEW:
        result.workers = min(workers, len(requests))
        answers: list[Answer] = []
        try:
            with Pool(limit=_LIMIT_SECONDS) as pool:
                # It needs Triton, without which this module can be imported.
                from moe_ops.cli.tuner import compiler

                pool.open(_LANE, compiler.main, (None, asdict(device)), result.workers)
                for order, request in requests:
                    pool.submit(_LANE, request, answers.append, order)
                while len(answers) < len(requests):
                    pool.step()
                    step(len(answers), len(requests))
        except PoolError as error:
            result.errors.append(str(error))
        result.errors += [answer.error for answer in answers if answer.error is not None]
    result.seconds = time.monotonic() - start
    return result


def _missing(calls: Iterable[tuple[Call, Tiles]], device: Device, result: Ahead) -> list[tuple[int, dict]]:
    """(order, request) of the parts of calls with a kernel that Triton's cache lacks, each kernel in one of them."""
    from moe_ops.aot.compiler import find_for
    from moe_ops.cli.tuner.compiler import recorded

    major, minor = device.capability or (0, 0)
    seen: set[str] = set()
    kernels: dict[str, bool] = {}
    requests = []
    for call, tiles in calls:
        parts = {part: part_key(call, tiles, part) for part in PARTS}
        new = [part for part, key in parts.items() if key not in seen]
        if not new:
            continue
        seen.update(parts.values())
        launches = recorded(call, tiles, device)
        for part in new:
            found = dict(find_for(launch, 10 * major + minor) for launch in launches[part])
            if any(not there and kernel not in kernels for kernel, there in found.items()):
                request = {"op": "compile", "call": call.to_json(), "candidates": [tiles_to_json(tiles)], "part": part}
                # The GEMMs take longest: whoever begins with the rest has them at the end, alone.
                requests.append((int(part == "other"), request))
            kernels |= found
    result.kernels, result.missing = len(kernels), sum(not there for there in kernels.values())
    return requests
