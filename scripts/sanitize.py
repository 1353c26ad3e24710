"""Run every kernel variant under compute-sanitizer: python scripts/sanitize.py [--tool ...] [--variant ...] [--log DIR]

One process for each tool and variant, and one without a tool before, which compiles the kernels and shows that they
are right by themselves. Results are kept in DIR/results.json while the code stays as it is, so that a run that was
interrupted goes on where it was. Exit status: 0 all clean, 1 an error was found or a run failed, 2 nothing could run.

    memcheck   accesses out of bounds; those of TMA from release 2026.2 on (there --option=--check-tensor-ops=yes)
    racecheck  hazards in shared memory; before 2026.3 also hazards that are none, where mbarriers, warpgroups or TMA
               synchronise: the TMA path, above all the variant "pingpong"
    synccheck  barriers and wgmma that not all threads reach
    initcheck  reads of global memory that nobody wrote. It may not see what TMA writes, and the TMA path multiplies
               padding rows that nobody wrote (their results are dropped): for the classic path and variant "direct"

The variant "planted" reads past the end of memory that nobody wrote: a tool that finds nothing there is blind.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEFAULT_TOOLS = ("memcheck", "racecheck")
TOOLKIT_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
# The run without a tool.
PLAIN = "plain"
PLANTED, FIND_PLANTED = "planted", ("memcheck", "initcheck")
# First release whose notes leave no false hazards of mbarriers, warpgroups and TMA.
FIRST_RACECHECK = (2026, 3)

TOOL_OPTIONS = {
    # Allocations side by side would hide an access past the end. API calls that fail raise in the child.
    "memcheck": ["--padding", "4096", "--report-api-errors", "no"],
}
# Every tensor its own cudaMalloc: the tools know no other bounds.
CHILD_ENV = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The assemblers and compilers that Triton starts are none of the tools' business; importing torch takes its time.
COMMON_OPTIONS = ["--target-processes", "application-only", "--launch-timeout", "120"]

SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
RACE_SUMMARY = re.compile(
    r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)


class CannotRunError(Exception):
    """Why nothing can run here, as one line."""


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        verdict: "ok", "errors", "blind" (nothing found where something is planted); "failed", "timeout" or
            "no summary" where the tool did not come to an end, which are not kept.
        errors: as the tool counts them; None where it does not say.
        warnings: likewise; they do not count.
        seconds: of the whole process.
    """

    verdict: str
    errors: int | None
    warnings: int
    seconds: float

    @property
    def final(self) -> bool:
        """Whether another run would only say the same."""
        return self.verdict in ("ok", "errors", "blind")


def parse_summary(output: str) -> tuple[int, int] | None:
    """(errors, warnings) by a tool's last summary, None if there is none."""
    race = RACE_SUMMARY.findall(output)
    if race:
        return int(race[-1][0]), int(race[-1][1])
    errors = SUMMARY.findall(output)
    return (int(errors[-1]), 0) if errors else None


def judge(tool: str, variant: str, output: str, status: int | None, seconds: float) -> Result:
    """The result of a run from its output and exit status, None where it ran out of time."""
    errors, warnings = parse_summary(output) or (None, 0)
    if status is None:
        verdict = "timeout"
    elif tool == PLAIN:
        verdict = "failed" if status else "ok"
    elif errors is None:
        verdict = "no summary"
    elif variant == PLANTED:
        verdict = "ok" if errors else "blind"
    elif errors:
        verdict = "errors"
    else:
        verdict = "failed" if status else "ok"
    return Result(verdict, errors, warnings, round(seconds, 1))


def read_version(text: str) -> tuple[int, ...]:
    """The version that `compute-sanitizer --version` prints; empty if it prints none."""
    found = re.search(r"Version (\d+(?:\.\d+)*)", text)
    return tuple(int(number) for number in found.group(1).split(".")) if found else ()


class Results:
    """Results by (tool, variant), kept in a file; those of other code, another release or other options are dropped.

    Args:
        file: made where it is missing.
        state: hash of all that results depend on.
    """

    def __init__(self, file: Path, state: str) -> None:
        self._file, self._state = file, state
        self._results = {}
        try:
            kept = json.loads(file.read_text())
            if kept["state"] == state:
                self._results = {tuple(key.split()): Result(**values) for key, values in kept["results"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no file, or not one of ours: start anew

    def get(self, tool: str, variant: str) -> Result | None:
        """An earlier result, if it is final."""
        result = self._results.get((tool, variant))
        return result if result is not None and result.final else None

    def add(self, tool: str, variant: str, result: Result) -> None:
        """Keeps a result; the file is whole at every moment."""
        self._results[tool, variant] = result
        results = {" ".join(key): value._asdict() for key, value in self._results.items()}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"state": self._state, "results": results}, indent=1) + "\n")
        os.replace(new, self._file)


def state_of(*settings) -> str:
    """Hash of what results depend on: the package, the cases, this file and the settings."""
    files = [*sorted((ROOT / "moe_ops").rglob("*.py")), ROOT / "tests" / "gpu" / "repeats.py", Path(__file__)]
    return hashlib.sha256(b"\0".join([repr(settings).encode(), *(file.read_bytes() for file in files)])).hexdigest()


def case_names() -> list[str]:
    """The variants there are."""
    try:
        from tests.gpu.repeats import ALL_CASES
    except ImportError as error:
        raise CannotRunError(f"{error}: run this with the Python that has torch and triton") from None
    return list(ALL_CASES)


def find_sanitizer(asked: str | None) -> tuple[str, tuple[int, ...]]:
    """(path, version) of compute-sanitizer."""
    path = shutil.which(asked or "compute-sanitizer") or (None if asked else shutil.which(TOOLKIT_SANITIZER))
    if path is None:
        cure = "it comes with the CUDA toolkit, and from PyPI as nvidia-cuda-sanitizer-api; name it by --sanitizer"
        raise CannotRunError(f"{asked or 'compute-sanitizer'} was not found or cannot be executed: {cure}")
    return path, read_version(subprocess.run([path, "--version"], capture_output=True, text=True).stdout)


def check_gpu() -> None:
    """Raises where torch sees no CUDA GPU."""
    import torch

    if not (torch.version.cuda and torch.cuda.is_available()):
        raise CannotRunError(f"torch {torch.__version__} sees no CUDA GPU")


def command_of(sanitizer: str, tool: str, variant: str, kernels: str | None, options: list[str]) -> list[str]:
    """The command line of a run."""
    child = [sys.executable, str(Path(__file__).resolve()), "--child", variant]
    if tool == PLAIN:
        return child
    chosen = ["--kernel-name", f"regex={kernels}"] if kernels else []
    return [sanitizer, "--tool", tool, *TOOL_OPTIONS.get(tool, []), *COMMON_OPTIONS, *chosen, *options, *child]


def run(command: list[str], log: Path, timeout: float) -> tuple[int | None, float]:
    """(exit status, seconds) of a command whose output goes to `log`; status None if it had to be ended."""
    start = time.monotonic()
    with log.open("w") as output:
        # A session of its own: what has to end is the tool and, with it, the program below.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env={**os.environ, **CHILD_ENV}, start_new_session=True
        )
        try:
            return process.wait(timeout), time.monotonic() - start
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - start
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def table(results: dict[tuple[str, str], Result]) -> str:
    """The results as lines of text."""
    rows = [("tool", "variant", "errors", "warnings", "seconds", "verdict")]
    for (tool, variant), result in results.items():
        errors = "-" if result.errors is None else result.errors
        rows.append((tool, variant, errors, result.warnings, result.seconds, result.verdict))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{value!s:{width}}" for value, width in zip(row, widths, strict=True)) for row in rows)


def plan(tools: list[str], variants: list[str]) -> list[tuple[str, str]]:
    """The runs, in order: a variant alone, then under each tool."""
    return [
        (tool, variant)
        for variant in variants
        for tool in (PLAIN, *tools)
        if variant != PLANTED or tool in FIND_PLANTED
    ]


def sanitize(options: argparse.Namespace, names: list[str]) -> int:
    """Makes the runs that are asked for and not done; returns the exit status."""
    sanitizer, version = find_sanitizer(options.sanitizer)
    check_gpu()
    if "racecheck" in options.tool and version < FIRST_RACECHECK:
        release = ".".join(map(str, version)) or "of unknown release"
        print(f"note: compute-sanitizer {release}: racecheck may report hazards that are none, see --help", flush=True)
    options.log.mkdir(parents=True, exist_ok=True)
    kept = Results(options.log / "results.json", state_of(version, options.kernels, options.option))
    results = {}
    for tool, variant in plan(options.tool, options.variant or [PLANTED, *names]):
        result = None if options.again else kept.get(tool, variant)
        if result is None:
            print(f"{tool} {variant} ...", flush=True)
            log = options.log / f"{tool}-{variant}.log"
            command = command_of(sanitizer, tool, variant, options.kernels, options.option)
            status, seconds = run(command, log, options.timeout)
            result = judge(tool, variant, log.read_text(errors="replace"), status, seconds)
            kept.add(tool, variant, result)
        results[tool, variant] = result
        if result.verdict != "ok":
            print(f"{tool} {variant}: {result.verdict}, see {options.log / f'{tool}-{variant}.log'}", flush=True)
            if not options.keep_going:
                break
    print(table(results))
    return 0 if all(result.verdict == "ok" for result in results.values()) else 1


def check(variant: str, device: str = "cuda") -> None:
    """The child: runs a variant on small inputs, with each of the two sorts, and checks it against the reference.

    Inputs and reference are made on the CPU, so that the tools see the kernels of the package and next to nothing else.
    """
    import copy
    from dataclasses import replace
    from unittest import mock

    import torch

    from moe_ops.devices import describe
    from moe_ops.reference import fused_moe_reference
    from moe_ops.testing import assert_correct
    from tests.cases import run as call
    from tests.gpu.repeats import ALL_CASES

    if variant == PLANTED:
        from moe_ops.kernels.stream import read_kernel

        memory, sink = (torch.empty(size, device=device) for size in (1024, 1))
        read_kernel[(1,)](memory, sink, 4 * memory.numel(), BLOCK=1024)
        torch.cuda.synchronize()
        return
    case = ALL_CASES[variant]
    hidden, intermediate = (288, 160) if case.quantized else (264, 136)
    args = case.inputs(
        num_tokens=3 if case.tokens[0] == 1 else 100, hidden=hidden, intermediate=intermediate, experts=4, top_k=2,
        dtype=torch.float16, bias=True,
    )  # fmt: skip
    reference = fused_moe_reference(args)
    on_device = copy.copy(args)
    for name, tensor in args.tensors().items():
        setattr(on_device, name, tensor.to(device))
    # As if there were two multiprocessors: a program of a persistent kernel then has several tiles to get wrong.
    two = mock.patch("moe_ops.plans.describe", lambda device: replace(describe(device), num_sms=2))
    for most_routes in (2048, 0):
        with two, case.override(), mock.patch("moe_ops.backends.routing.SMALL_ROUTES", most_routes):
            assert_correct(call(on_device).cpu(), args, reference=reference)


def parser(names: list[str]) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="sanitize.py [options]"
    )
    choices = [PLANTED, *names]
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(DEFAULT_TOOLS))
    parser.add_argument("--variant", nargs="+", choices=choices, help="all, if not given")
    parser.add_argument("--keep-going", action="store_true", help="go on after an error")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "sanitize", metavar="DIR", help="logs and results")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of one run (default: 600)")
    parser.add_argument("--sanitizer", metavar="PATH", help="the compute-sanitizer to use")
    parser.add_argument(
        "--kernels", metavar="REGEX", help="check only kernels with such a (mangled) name, ours end in _kernel; all"
        " by default: there are few others, and a pattern that is wrong checks nothing",
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], help="handed to compute-sanitizer, as --option=--print-limit=1000"
    )
    parser.add_argument("--child", choices=choices, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    sys.path.insert(0, str(ROOT))
    try:
        names = case_names()
        options = parser(names).parse_args(arguments)
        if options.child:
            check(options.child)
            return 0
        return sanitize(options, names)
    except CannotRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to go on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
