"""`python -m moe_ops tune`: tiles that beat the heuristic's, measured on this GPU and written to a table."""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_ops import env
from moe_ops.cli import plots
from moe_ops.cli.ahead import MOST_WORKERS
from moe_ops.cli.calls import TOKENS, Sizes
from moe_ops.cli.explain import describe_tile
from moe_ops.cli.known import ARCHITECTURES, CARDS, known_card
from moe_ops.cli.options import (
    HelpFormatter,
    UsageError,
    add_dtype_option,
    add_format_option,
    add_shape_options,
    add_tokens_option,
    check_files,
    chosen_shapes,
    positive,
)
from moe_ops.cli.output import show_table
from moe_ops.cli.progress import Progress
from moe_ops.cli.tuner import report, worker
from moe_ops.cli.tuner.calls import Call
from moe_ops.cli.tuner.candidates import first_wave
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Pool, PoolError
from moe_ops.cli.tuner.search import COMPILE, DEVICE, MARGIN, Found, Search
from moe_ops.devices import Device
from moe_ops.dispatch import choose_path
from moe_ops.tuning.bucket import Bucket, device_folder
from moe_ops.tuning.files import ConfigError, is_there, write_atomically
from moe_ops.tuning.lookup import PACKAGED
from moe_ops.tuning.table import Table, dump_table, load_table

_EXAMPLES = """examples:
  python -m moe_ops tune --model qwen3-30b-a3b
  python -m moe_ops tune --model deepseek-v3 --tp 8 --format fp8_block --tokens 1,16,64,256,1024
  python -m moe_ops tune --model ./checkpoint/config.json --out ./tables     (then MOE_OPS_CONFIG_DIR=./tables)
  python -m moe_ops tune --model mixtral-8x7b --dry-run --device h200        (lists candidates, needs no GPU)

How it works: the kernels of candidates near the heuristic's tiles that fit the device are compiled, each once for all
models of the run, in worker processes that never touch the GPU, while another one runs and times those that are ready:
one that crashes or hangs costs only itself. Those whose result is right are timed in CUDA graphs with a cold L2, taking
turns in every round. The winner is held against the reference, and has to beat the heuristic by more than --margin in
rounds of their own; otherwise the heuristic's tiles are kept, and the table says so. Killed at any moment, it leaves
whole files, and the same command goes on where it was. docs/tuning.md has more."""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="measure tiles on this GPU and write tables that calls use from then on",
        description="Finds tiles for the experts of a model on this GPU and writes them to a table, which calls of "
        "those sizes, dtype and format use from the next process on. Without a table the heuristic chooses, which is "
        "meant to be good; a table makes it better or leaves it alone. Models with equal experts are tuned once.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    calls = parser.add_argument_group("calls to tune")
    add_shape_options(calls, "one of --model, --common and --shape is needed")
    add_tokens_option(calls, TOKENS)
    add_dtype_option(calls)
    add_format_option(calls)
    calls.add_argument(
        "--path", choices=("auto", "tma", "classic"), default="auto", metavar="NAME",
        help="auto, tma or classic (default: auto, as the op takes)",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--again", action="store_true", help="tune token counts anew that the table has already")
    how.add_argument(
        "--margin", type=_percent, default=MARGIN, metavar="P", help="percent that a winner has to gain (default: 2)"
    )
    how.add_argument(
        "--limit", type=positive, default=90, metavar="S", help="seconds that a candidate may take (default: 90)"
    )
    how.add_argument(
        "--workers", type=positive, metavar="N", help="processes that compile (default: three quarters of the CPUs)"
    )
    how.add_argument("--dry-run", action="store_true", help="list the candidates and measure nothing")
    how.add_argument("--device", metavar="NAME", help=f"with --dry-run: one of {', '.join((*CARDS, *ARCHITECTURES))}")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", help="where tables go (default: MOE_OPS_CONFIG_DIR if set, else the package's own)"
    )
    output.add_argument("--plot", metavar="DIR", help="where the PNGs go (default: here; needs matplotlib)")
    output.add_argument("--json", metavar="FILE", help="write everything that was found to FILE")
    output.add_argument("--log", metavar="FILE", help="append what compilers and drivers print to FILE")
    parser.set_defaults(run=run)


def _percent(text: str) -> float:
    try:
        value = float(text) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percent from 0 to 100")
    return value


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    shapes = chosen_shapes(options)
    if not shapes:
        raise UsageError("it needs a --model, a --shape or --common; --help lists the known ones")
    if options.dry_run:
        return _dry_run(options, shapes)
    if options.device is not None:
        raise UsageError("--device is for --dry-run; tuning measures the GPU that is here")
    check_files(options, "json", "log")
    if options.plot is not None and not plots.available():
        raise UsageError(plots.MISSING)
    if not torch.cuda.is_available():
        raise UsageError("it needs a CUDA device, and torch sees none; --dry-run lists candidates without one")
    out = Path(options.out or env.config_dir() or PACKAGED)
    try:
        out.mkdir(parents=True, exist_ok=True)
        Path(options.plot or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be made: {error.strerror}; pass another --out or --plot") from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"{out} cannot be written; pass --out, and set MOE_OPS_CONFIG_DIR to the same folder")
    try:
        # It needs Triton, without which the commands for a CPU work.
        from moe_ops.cli.tuner import compiler

        return Tuning(options, out, {DEVICE: worker.main, COMPILE: compiler.main}).run(shapes)
    except PoolError as error:
        raise SystemExit(f"python -m moe_ops tune: {error}; --log FILE keeps what they print") from error


def _dry_run(options: argparse.Namespace, shapes: dict[str, Sizes]) -> int:
    try:
        device = known_card(options.device or "sm_90").device
    except ValueError as error:
        raise UsageError(f"--device {error}") from error
    for name, sizes in shapes.items():
        for call in _calls(sizes, options, device):
            wave = first_wave(call.problem(), device, call.path)
            rows = [(tiles.variant, describe_tile(tiles.up), describe_tile(tiles.down)) for tiles in wave]
            title = f"{name}, M = {call.tokens}, on {device.name}: the heuristic's, and {len(wave) - 1} others"
            show_table(title, ("variant", "up", "down"), rows)
    return 0


def _calls(sizes: Sizes, options: argparse.Namespace, device: Device) -> list[Call]:
    """The calls of a shape, on the path that the op would take."""
    calls = []
    for tokens in sorted(set(options.tokens)):
        call = Call(sizes, tokens, options.dtype, options.format, options.path)
        try:
            path, _ = choose_path(call.problem(), device)
        except ValueError as error:
            raise UsageError(str(error)) from error
        calls.append(Call(sizes, tokens, options.dtype, options.format, path))
    return calls


@dataclass
class _Goal:
    """A table in the making.

    Attributes:
        name: of the first shape that asked for it.
        file: where it goes.
        table: what is in it so far.
        journal: of what was run for it.
        missing: how many calls are still to be found.
        founds: what was found.
    """

    name: str
    file: Path
    table: Table
    journal: Journal
    missing: int
    founds: list[Found] = field(default_factory=list)


class Tuning:
    """A run of the command on the GPU."""

    def __init__(self, options: argparse.Namespace, out: Path, targets: dict[str, Callable]) -> None:
        """Starts nothing yet.

        Args:
            options: of the command.
            out: the folder of tables.
            targets: the workers' functions by lane.
        """
        self._options, self._out, self._targets = options, out, targets
        self._record: dict[str, object] = {}
        self._goals: dict[Bucket, _Goal] = {}

    def run(self, shapes: dict[str, Sizes]) -> int:
        """Tunes shapes, those with equal sizes once; returns the exit status, 1 where nothing was found for a call."""
        options, start = self._options, time.monotonic()
        with Pool(limit=options.limit) as pool, Progress(0, unit="run") as progress:
            pool.open(DEVICE, self._targets[DEVICE], (options.log,))
            hello = pool.hello(DEVICE)
            device = Device(**{**hello["device"], "capability": _tuple(hello["device"]["capability"])})
            pool.open(COMPILE, self._targets[COMPILE], (options.log, hello["device"]), options.workers or _workers())
            made = {name: hello["versions"].get(name) for name in ("moe_ops", "torch", "triton")}
            made = {name: value for name, value in made.items() if value} | {"date": datetime.date.today().isoformat()}
            self._record = {"device": device.name, "made": made, "tables": []}
            progress.say(f"device={device.name} torch={made.get('torch')} triton={made.get('triton')}")
            calls = self._open_goals(shapes, device, made, progress)

            def step(what: str, more: int) -> None:
                if more < 0:
                    progress.advance()
                else:
                    progress.extend(more)
                    progress.begin(what)

            journals = {bucket: goal.journal for bucket, goal in self._goals.items()}
            search = Search(device, pool, journals, margin=options.margin, step=step)
            try:
                search.run(calls, lambda found: self._keep(found, made, progress))
            finally:
                for goal in self._goals.values():
                    goal.journal.close()
        founds = [found for goal in self._goals.values() for found in goal.founds]
        if founds:
            print(f"{len(founds)} calls in {time.monotonic() - start:.0f} s: {report.summary(founds)}", flush=True)
        return 0 if all(found.entry is not None for found in founds) else 1

    def _open_goals(self, shapes: dict[str, Sizes], device: Device, made: dict[str, str], progress: Progress
                    ) -> list[Call]:  # fmt: skip
        """Makes the goals, and gives the calls that are to be tuned for them."""
        wanted: dict[Bucket, tuple[str, list[Call]]] = {}
        for name, sizes in shapes.items():
            for call in _calls(sizes, self._options, device):
                wanted.setdefault(call.bucket, (name, []))[1].append(call)
        folder, everything = self._out / device_folder(device.name), []
        # The date is no part of it: a run that was killed before midnight goes on after.
        head = {"device": device.name, **{key: value for key, value in made.items() if key != "date"}}
        for bucket, (name, calls) in wanted.items():
            file = folder / bucket.file_name
            table = self._table(file, bucket, device.name, progress)
            known = set() if self._options.again else {entry.tokens for entry in table.entries}
            calls = list(dict.fromkeys(calls))
            if skipped := [call.tokens for call in calls if call.tokens in known]:
                progress.say(f"{name}: {file} has M = {', '.join(map(str, skipped))} already; --again tunes them anew")
            calls = [call for call in calls if call.tokens not in known]
            if not calls:
                continue
            journal = Journal(folder / f".{bucket.file_name}.journal", head)
            if len(journal):
                progress.say(f"{name}: goes on after {len(journal)} results of a run that was ended")
            self._goals[bucket] = _Goal(name, file, table, journal, len(calls))
            everything += calls
        return everything

    def _keep(self, found: Found, made: dict[str, str], progress: Progress) -> None:
        """Writes what was found for a call, and ends the goal that has all of its calls."""
        goal = self._goals[found.call.bucket]
        goal.founds.append(found)
        goal.founds.sort(key=lambda one: one.call.tokens)
        if found.entry is not None:
            goal.table = goal.table.merged(Table(found.call.bucket, goal.table.device, (found.entry,), made))
            write_atomically(goal.file, dump_table(goal.table))
        what = found.error or f"{report.gain(found):+.1%}"
        progress.say(
            f"{goal.name} M={found.call.tokens}: {what}, {found.candidates} candidates, {len(found.failed)} failed"
        )
        goal.missing -= 1
        if not goal.missing:
            self._finish(goal, progress)

    @staticmethod
    def _table(file: Path, bucket: Bucket, device: str, progress: Progress) -> Table:
        """The table that is there; an empty one where there is none, or a broken one, which will be replaced."""
        if is_there(file):
            try:
                return load_table(file, bucket)
            except ConfigError as error:
                progress.say(f"it will be replaced: {error}")
        return Table(bucket, device, ())

    def _finish(self, goal: _Goal, progress: Progress) -> None:
        goal.journal.remove()
        name, founds, bucket = goal.name, goal.founds, goal.table.bucket
        progress.clear()
        show_table(f"\n{name}: {goal.file}", report.COLUMNS, [report.row(found) for found in founds])
        print(f"{name}: {report.summary(founds)}", flush=True)
        calls = [report.to_json(found) for found in founds]
        self._record["tables"].append({"name": name, "file": str(goal.file), "calls": calls})
        if self._options.json:
            write_atomically(Path(self._options.json), json.dumps(self._record, indent=1))
        if plots.available() and any(found.entry for found in founds):
            form = "" if bucket.format == "none" else f"-{bucket.format}"
            png = Path(self._options.plot or ".") / f"tune-{name}-{bucket.dtype}{form}.png"
            report.plot(name, goal.table, png)
            print(png, flush=True)


def _workers() -> int:
    """Processes that compile: the others of the CPUs are for what times, and what hands out work."""
    return min(MOST_WORKERS, max(1, (os.cpu_count() or 2) * 3 // 4))


def _tuple(value: Sequence[int] | None) -> tuple[int, int] | None:
    return None if value is None else tuple(value)
