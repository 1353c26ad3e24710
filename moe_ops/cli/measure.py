"""One cell: a call by every variant, each checked before it is timed, and what the ceilings say of the times."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from moe_ops import plans
from moe_ops.arguments import Arguments
from moe_ops.cli import harness
from moe_ops.cli.check import Check, prepare_check
from moe_ops.cli.limits import Rates, Work, stage_report, work_of
from moe_ops.cli.peers import PEERS
from moe_ops.devices import describe
from moe_ops.dispatch import Plan, choose_path
from moe_ops.problem import Problem, make_problem
from moe_ops.testing import override
from moe_ops.tuning import VARIANTS
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles

# Ours: a path with the tiles that a call gets there; on the path that a call takes the tiles of the heuristic, those of
# a table where there is one, and a kernel variant with its own.
OURS = ("tma", "classic", "heuristic", "tuned", *VARIANTS)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Session:
    """What all cells of a run share.

    Attributes:
        rounds: samples of each variant.
        graph: time CUDA graphs on the device, not eager calls by the host's clock.
        ceilings: calls by name, ready to be timed: "cublas" and "stream", and "scaled_mm" for formats of fp8 and int8.
        between: called before each sample.
        sample: (call) -> how long it took.
        read: (bytes) -> a call that reads so many, None if there are not so many.
    """

    rounds: int
    graph: bool
    ceilings: Mapping[str, harness.Call]
    between: harness.Call
    sample: Callable[[harness.Call], harness.Sample]
    read: Callable[[int], harness.Call | None]

    def ready(self, call: harness.Call) -> harness.Call:
        """A call as it will be timed."""
        return harness.capture(call) if self.graph else call


@dataclass
class _Entries:
    """The variants of a cell that are ready to be timed.

    Attributes:
        calls: by name; stages as "path.stage".
        differences: of each variant's result from ours.
        oracle: of a quantised call, of each variant's result: its error over the emulator's.
        errors: why something could not be timed.
    """

    calls: dict[str, harness.Call] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    oracle: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, prepare: Callable[[], dict[str, harness.Call]]) -> None:
        """Adds what `prepare` gives, or the reason why it gives nothing."""
        self.calls |= self.attempt(name, prepare) or {}

    def attempt(self, name: str, function: Callable[[], _T]) -> _T | None:
        """What `function` gives; None, and an entry of the reason, where it fails."""
        try:
            return function()
        except Exception as error:  # foreign code: whatever it raises is its row's entry, not the end of the run
            self.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what ran out of memory left it full
        return None


def start_session(rounds: int, *, graph: bool, fp8: bool = False) -> Session:
    """Readies ceilings (with `fp8` a product in that too) and timers on the current GPU."""
    own = harness.Ceilings(fp8=fp8)
    ceilings = {name: harness.capture(call) for name, call in own.variants.items()} if graph else own.variants
    sample = harness.device_milliseconds if graph else harness.host_milliseconds
    return Session(rounds, graph, ceilings, harness.L2Flush(), sample, own.read)


@torch.no_grad()
def measure(args: Arguments, variants: list[str], session: Session, *, stages: bool) -> dict:
    """Times a call.

    Args:
        args: the call.
        variants: what to time: of `OURS` and `PEERS`.
        session: of the run.
        stages: time the stages of our paths too.

    Returns:
        The cell: "ms", "spread_ms", "differences", "errors", rates, limits, "read_ms" (a read of as many bytes), and
        per path of ours what padding adds. Of a quantised call "oracle" too.
    """
    entries = _Entries()
    quantized = args.quantization != "none"
    # A format may lack a kernel for one of many cells, and the others are worth their time.
    check = entries.attempt("ours", lambda: _check(args)) if quantized else _check(args)
    for name in variants if check is not None else ():
        entries.enter(name, lambda name=name: {name: _checked(name, args, check, session, entries)})
    paths = [name for name in variants if name in OURS and name in entries.calls]
    if stages:
        for path in paths:
            entries.enter(f"{path} stages", lambda path=path: _stages(path, args, check))
    work = work_of(args)
    ceilings = dict(session.ceilings)
    # Of as many bytes as the call has to move: what the launch and the L2's dirty lines cost any kernel is in it.
    if (read := session.read(work.least_bytes)) is not None:
        ceilings["read"] = session.ready(read)
    timings = harness.time_round_robin(entries.calls | ceilings, session.rounds, session.sample, session.between)
    return _cell(args, work, variants, paths, entries, timings)


def _check(args: Arguments) -> Check:
    return prepare_check(args, own_call(args, "auto")())


def own_call(args: Arguments, name: str) -> harness.Call:
    """The op on one of its paths ("auto" too), or as one of `OURS`."""
    if name == "heuristic":
        return forced(args, *_heuristic(args))
    if name in VARIANTS:
        return _within(own_call(args, "auto"), variant=name)
    op, tensors = torch.ops.moe_ops.fused_moe_tma, args.tensors()
    path = "auto" if name == "tuned" else name
    if args.quantization == "none":
        values = tuple(tensors.values())
        return lambda: op(*values, path=path)
    options = {"quantization": args.quantization, "block_shape": args.block_shape, "path": path}
    return lambda: op(**tensors, **options)


def forced(args: Arguments, path: str, tiles: Tiles) -> harness.Call:
    """A call with these tiles, whatever the heuristic or a table says."""
    return _within(own_call(args, path), path=path, variant=tiles.variant, config=(tiles.up, tiles.down))


def _within(call: harness.Call, **forced) -> harness.Call:
    """A call under `override`."""

    def run() -> torch.Tensor:
        with override(**forced):
            return call()

    return run


def _heuristic(args: Arguments) -> tuple[str, Tiles]:
    """Path and tiles of a call without a table."""
    problem, device = make_problem(args), describe(args.hidden_states.device)
    path, _ = choose_path(problem, device)
    return path, heuristic_tiles(problem, device, path)


def _checked(name: str, args: Arguments, check: Check, session: Session, entries: _Entries) -> harness.Call:
    call = session.ready(own_call(args, name) if name in OURS else PEERS[name].prepare(args))
    result = call()
    ratio = check.oracle(result)
    entries.differences[name] = check.difference(result)
    if ratio is not None:
        entries.oracle[name] = ratio
    return call


def _plan(args: Arguments, name: str) -> tuple[Problem, Plan]:
    """The plan of a call as one of `OURS`."""
    if name == "heuristic":
        path, tiles = _heuristic(args)
        with override(path=path, variant=tiles.variant, config=(tiles.up, tiles.down)):
            return plans.plan(args)
    with override(variant=name) if name in VARIANTS else override(path=None if name == "tuned" else name):
        return plans.plan(args)


def _stages(name: str, args: Arguments, check: Check) -> dict[str, harness.Call]:
    problem, plan = _plan(args, name)
    backend = importlib.import_module(f"moe_ops.backends.{plan.path}")
    out = torch.full_like(check.expected, float("nan"))
    stages = harness.capture_stages(lambda: backend.stages(args, problem, plan, out))
    out.fill_(float("nan"))  # the warming-up wrote it already
    for replay in stages.values():
        replay()
    check.difference(out)
    return {f"{name}.{stage}": replay for stage, replay in stages.items()}


def _cell(
    args: Arguments, work: Work, variants: list[str], paths: list[str], entries: _Entries, timings: harness.Timings
) -> dict:
    scaled_ms = timings.median("scaled_mm")
    rates = Rates(
        harness.Ceilings.teraflops(timings.median("cublas")),
        harness.Ceilings.gigabytes(timings.median("stream")),
        scaled_ms and harness.Ceilings.teraflops(scaled_ms),
    )
    limit, bound = work.limit(rates)
    cell = {
        "tokens": args.hidden_states.shape[0],
        "experts_met": work.experts_met,
        "ms": {name: timings.median(name) for name in variants},
        "spread_ms": {name: [min(samples), max(samples)] for name, samples in timings.rounds.items()},
        "differences": entries.differences,
        "errors": entries.errors,
        "cublas_tflops": rates.teraflops,
        "stream_gbs": rates.gigabytes,
        "limit_ms": limit,
        "bound": bound,
        "read_ms": timings.median("read"),
        "paths": {},
    }
    if args.quantization != "none":
        cell |= {"oracle": entries.oracle, "scaled_mm_tflops": rates.scaled_teraflops}
    for path in paths:
        plan = _plan(args, path)[1]
        padded = work.padded_rows(plan.block_m)
        cell["paths"][path] = {
            "variant": plan.variant,
            "tiles": "heuristic" if path == "heuristic" or plan.source == "heuristic" else "table",
            "block_m": plan.block_m,
            "padded_rows": padded,
            "padded_limit_ms": work.limit(rates, padded)[0],
        }
        stages = {
            name.removeprefix(f"{path}."): timings.median(name) for name in entries.calls if name.startswith(f"{path}.")
        }
        if stages:
            cell["paths"][path]["stages"] = stage_report(work, rates, stages, cell["ms"][path])
    return cell
