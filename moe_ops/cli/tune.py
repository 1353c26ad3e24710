"""`python -m moe_ops tune`: tiles that beat the heuristic's, measured on this GPU and written to a table."""

import argparse
import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moe_ops import env
from moe_ops.cli import plots
from moe_ops.cli.calls import TOKENS, Sizes
from moe_ops.cli.explain import describe_tile
from moe_ops.cli.known import ARCHITECTURES, CARDS, known_card
from moe_ops.cli.options import UsageError, add_format_option, add_shape_options, chosen_shapes, positive, token_counts
from moe_ops.cli.output import show_table
from moe_ops.cli.progress import Progress
from moe_ops.cli.tuner import report, worker
from moe_ops.cli.tuner.calls import Call
from moe_ops.cli.tuner.candidates import first_wave
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Answer, Pool, PoolError
from moe_ops.cli.tuner.search import MARGIN, Found, Search
from moe_ops.devices import Device
from moe_ops.dispatch import choose_path, make_plan
from moe_ops.tuning.bucket import Bucket, device_folder
from moe_ops.tuning.files import ConfigError, is_there, write_atomically
from moe_ops.tuning.lookup import PACKAGED
from moe_ops.tuning.table import Table, dump_table, load_table

# Device memory of a worker beside weights and workspaces: the CUDA context, the flush, a reference of some tokens; and
# copies of a result in float64 that a check makes.
_BESIDE, _COPIES = 3 << 30, 8
_USABLE = 0.85
_MOST_WORKERS = 12

_EXAMPLES = """examples:
  python -m moe_ops tune --model qwen3-30b-a3b
  python -m moe_ops tune --model deepseek-v3 --tp 8 --format fp8_block --tokens 1,16,64,256,1024
  python -m moe_ops tune --model ./checkpoint/config.json --out ./tables     (then MOE_OPS_CONFIG_DIR=./tables)
  python -m moe_ops tune --model mixtral-8x7b --dry-run --device h200        (lists candidates, needs no GPU)

How it works: candidates near the heuristic's tiles that fit the device are compiled and run once, several at a time,
in worker processes, so that one that crashes or hangs costs only itself. Those whose result is right are timed in CUDA
graphs with a cold L2, taking turns in every round. The winner is held against the reference, and has to beat the
heuristic by more than --margin in rounds of their own; otherwise the heuristic's tiles are kept, and the table says so.
Killed at any moment, it leaves whole files, and the same command goes on where it was. docs/tuning.md has more."""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="measure tiles on this GPU and write tables that calls use from then on",
        description="Finds tiles for the experts of a model on this GPU and writes them to a table, which calls of "
        "those sizes, dtype and format use from the next process on. Without a table the heuristic chooses, which is "
        "meant to be good; a table makes it better or leaves it alone. Models with equal experts are tuned once.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_options(parser, "one of --model and --shape is needed")
    parser.add_argument("--tokens", type=token_counts, default=TOKENS, help="token counts to tune, comma-separated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    add_format_option(parser)
    parser.add_argument("--path", choices=("auto", "tma", "classic"), default="auto", help="(default: as the op takes)")
    parser.add_argument(
        "--out", metavar="DIR", help="where tables go (default: MOE_OPS_CONFIG_DIR if set, else the package's own)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes that compile (default: by CPUs, memory)"
    )
    parser.add_argument("--limit", type=positive, default=90, metavar="S", help="seconds a candidate may take (90)")
    parser.add_argument("--margin", type=_percent, default=MARGIN, metavar="P", help="percent a winner must gain (2)")
    parser.add_argument("--again", action="store_true", help="tune token counts anew that the table has already")
    parser.add_argument("--plot", metavar="DIR", help="where the PNG goes (default: here; needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found to FILE")
    parser.add_argument("--log", metavar="FILE", help="append what compilers and drivers print to FILE")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and measure nothing")
    parser.add_argument(
        "--device", metavar="NAME", help=f"with --dry-run: one of {', '.join((*CARDS, *ARCHITECTURES))}"
    )
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
        raise UsageError("it needs a --model or a --shape; --help lists the known ones")
    if options.dry_run:
        return _dry_run(options, shapes)
    if options.device is not None:
        raise UsageError("--device is for --dry-run; tuning measures the GPU that is here")
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
        return Tuning(options, out, worker.main).run(shapes)
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


class PoolRunner:
    """A `search.Runner` by worker processes."""

    def __init__(self, pool: Pool, workers: int) -> None:
        """Takes the pool, and how many workers there may be at a time."""
        self._pool, self._workers = pool, workers

    def run(
        self, requests: Sequence[dict], *, alone: bool, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Has requests answered; see `search.Runner`."""
        return self._pool.run(requests, 1 if alone else self._workers, done)


class Tuning:
    """A run of the command on the GPU."""

    def __init__(self, options: argparse.Namespace, out: Path, target: Callable) -> None:
        """Starts nothing yet.

        Args:
            options: of the command.
            out: the folder of tables.
            target: the workers' function.
        """
        self._options, self._out, self._target = options, out, target
        self._record: dict[str, object] = {}

    def run(self, shapes: dict[str, Sizes]) -> int:
        """Tunes shapes, those with equal sizes once; returns the exit status, 1 where nothing was found for a call."""
        options = self._options
        with Pool(self._target, (options.log,), limit=options.limit) as pool:
            hello = pool.hello()
            device = Device(**{**hello["device"], "capability": _tuple(hello["device"]["capability"])})
            made = {name: hello["versions"].get(name) for name in ("moe_ops", "torch", "triton")}
            made = {name: value for name, value in made.items() if value} | {"date": datetime.date.today().isoformat()}
            self._record = {"device": device.name, "made": made, "tables": []}
            buckets: dict[Bucket, tuple[str, list[Call]]] = {}
            for name, sizes in shapes.items():
                for call in _calls(sizes, options, device):
                    buckets.setdefault(call.bucket, (name, []))[1].append(call)
            founds = []
            with Progress(0, unit="run") as progress:
                progress.say(f"device={device.name} torch={made.get('torch')} triton={made.get('triton')}")
                for bucket, (name, calls) in buckets.items():
                    workers = self._workers(calls, device, hello["memory"])
                    runner = PoolRunner(pool, workers)
                    founds += self._tune(bucket, name, list(dict.fromkeys(calls)), device, made, runner, progress)
        return 0 if all(found.entry is not None for found in founds) else 1

    def _workers(self, calls: list[Call], device: Device, memory: int) -> int:
        """As many processes as the CPUs can keep busy and the device's memory has room for."""
        problem = calls[0].problem()
        weights = problem.num_experts * problem.hidden_size * (problem.w1_rows + problem.intermediate_size)
        weights *= problem.weight_dtype.itemsize
        workspace = max(make_plan(call.problem(), device).workspace_bytes for call in calls)
        copies = _COPIES * max(call.tokens for call in calls) * problem.hidden_size * 8
        room = int(_USABLE * memory // (weights // problem.scheme.planes + 2 * workspace + copies + _BESIDE))
        by_cpus = min(_MOST_WORKERS, (os.cpu_count() or 2) * 3 // 4)
        return max(1, min(self._options.workers or by_cpus, room))

    def _tune(self, bucket: Bucket, name: str, calls: list[Call], device: Device, made: dict[str, str], runner,
              progress: Progress) -> list[Found]:  # fmt: skip
        folder = self._out / device_folder(device.name)
        file = folder / bucket.file_name
        table = self._table(file, bucket, device.name, progress)
        known = set() if self._options.again else {entry.tokens for entry in table.entries}
        skipped = [call.tokens for call in calls if call.tokens in known]
        if skipped:
            progress.say(f"{name}: {file} has M = {', '.join(map(str, skipped))} already; --again tunes them anew")
        calls = [call for call in calls if call.tokens not in known]
        founds: list[Found] = []
        if not calls:
            return founds
        # The date is no part of it: a run that was killed before midnight goes on after.
        head = {"device": device.name, **{key: value for key, value in made.items() if key != "date"}}
        journal = Journal(folder / f".{bucket.file_name}.journal", head)
        if len(journal):
            progress.say(f"{name}: goes on after {len(journal)} results of a run that was ended")

        def step(what: str, more: int) -> None:
            if more < 0:
                progress.advance()
            else:
                progress.extend(more)
                progress.begin(f"{name} {what}")

        def found(one: Found) -> None:
            nonlocal table
            founds.append(one)
            if one.entry is not None:
                table = table.merged(Table(bucket, device.name, (one.entry,), made))
                write_atomically(file, dump_table(table))
            gained = report.gain(one)
            progress.say(
                f"{name} M={one.call.tokens}: {one.error or f'{gained:+.1%}'}, {one.candidates} candidates, "
                f"{len(one.failed)} failed"
            )

        search = Search(device, runner, journal, margin=self._options.margin, step=step)
        try:
            search.run(calls, found)
        except BaseException:
            journal.close()
            raise
        journal.remove()
        self._finish(name, file, table, founds, progress)
        return founds

    @staticmethod
    def _table(file: Path, bucket: Bucket, device: str, progress: Progress) -> Table:
        """The table that is there; an empty one where there is none, or a broken one, which will be replaced."""
        if is_there(file):
            try:
                return load_table(file, bucket)
            except ConfigError as error:
                progress.say(f"it will be replaced: {error}")
        return Table(bucket, device, ())

    def _finish(self, name: str, file: Path, table: Table, founds: list[Found], progress: Progress) -> None:
        progress.clear()
        show_table(f"\n{name}: {file}", report.COLUMNS, [report.row(found) for found in founds])
        print(f"{name}: {report.summary(founds)}", flush=True)
        self._record["tables"].append({"name": name, "file": str(file), "calls": [report.to_json(f) for f in founds]})
        if self._options.json:
            write_atomically(Path(self._options.json), json.dumps(self._record, indent=1))
        if plots.available() and any(found.entry for found in founds):
            bucket = table.bucket
            form = "" if bucket.format == "none" else f"-{bucket.format}"
            png = Path(self._options.plot or ".") / f"tune-{name}-{bucket.dtype}{form}.png"
            report.plot(name, table, png)
            print(png, flush=True)


def _tuple(value: Sequence[int] | None) -> tuple[int, int] | None:
    return None if value is None else tuple(value)
