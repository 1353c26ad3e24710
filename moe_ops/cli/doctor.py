"""`python -m moe_ops doctor`: checks of an installation that say what to do."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_ops import env
from moe_ops.cli.env import DRIVER_FILE, driver_version
from moe_ops.cli.options import HelpFormatter
from moe_ops.cli.output import show_table
from moe_ops.devices import describe, triton_facts
from moe_ops.dispatch import tma_obstacle
from moe_ops.tuning.files import ConfigError
from moe_ops.tuning.lookup import PACKAGED
from moe_ops.tuning.table import load_table

_TORCH, _TRITON = (2, 11), (3, 6)
_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        state: "ok", "note" (worth knowing, nothing is broken), "skipped" or "broken".
        found: what there is.
        cure: what to do; "" where nothing is to be done.
    """

    check: str
    state: str
    found: str
    cure: str = ""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation and say what to do; exit status 1 if something is broken",
        description="Checks what the op needs, the cheap things first: versions of torch and Triton, the driver, a C++ "
        "compiler, the folders of caches and tables; then compiles and runs small calls on every path that this device "
        "has, and holds their results against the reference. Every finding that is not ok says what to do.",
        epilog="exit status: 0 if nothing is broken, 1 if something is.\n\nexamples:\n  python -m moe_ops doctor\n"
        "  python -m moe_ops doctor --json",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    findings = [finding for check in CHECKS for finding in _carefully(check)]
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        rows = [(f.check, f.state, f.found, f.cure or None) for f in findings]
        show_table("moe_ops doctor", ("check", "state", "found", "what to do"), rows)
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def _carefully(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check's findings; a check that itself fails is one."""
    try:
        return list(check())
    except Exception as error:  # whatever a broken installation raises is what was looked for
        name = check.__name__.replace("_", " ")
        return [Finding(name, "broken", f"{type(error).__name__}: {_one_line(error)}", "see the error")]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def torch_version() -> Iterator[Finding]:
    """torch is new enough."""
    good = _at_least(torch.__version__, _TORCH)
    yield Finding("torch", "ok" if good else "broken", torch.__version__, "" if good else "install torch>=2.11")


def triton_version() -> Iterator[Finding]:
    """Triton is there and new enough."""
    version, has_descriptors = triton_facts()
    if version is None:
        state = "broken" if torch.cuda.is_available() else "note"
        yield Finding("triton", state, "not installed", "install triton>=3.6; on the CPU the op works without")
        return
    good = _at_least(version, _TRITON) and has_descriptors
    yield Finding("triton", "ok" if good else "broken", version, "" if good else "install triton>=3.6")


def driver() -> Iterator[Finding]:
    """torch reaches a GPU where there is one."""
    if torch.cuda.is_available():
        # So the driver is new enough for torch's CUDA, which would not have started otherwise.
        yield Finding("driver", "ok", f"{driver_version()}, CUDA {torch.version.cuda} in torch")
        device = describe(torch.device("cuda", torch.cuda.current_device()))
        yield Finding("device", "ok", f"{device.name}, compute capability {device.capability}")
    elif DRIVER_FILE.exists():
        cause = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no device"
        cure = "install a torch with CUDA" if torch.version.cuda is None else "see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield Finding("driver", "broken", f"an NVIDIA driver is loaded, and {cause}", cure)
    else:
        yield Finding("driver", "note", "no NVIDIA driver: the op runs on the CPU")


def compiler() -> Iterator[Finding]:
    """A C++ compiler, for Triton's launchers and torch.compile."""
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found:
        yield Finding("compiler", "ok", found)
    else:
        state = "broken" if torch.cuda.is_available() else "note"
        yield Finding("compiler", state, "none", "install g++: Triton and torch.compile on the CPU need it")


def caches() -> Iterator[Finding]:
    """Triton can write its cache."""
    if triton_facts()[0] is None:
        yield Finding("cache", "skipped", "Triton is not installed")
        return
    from triton import knobs

    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        cure = "make it writable, or set TRITON_CACHE_DIR to a folder that is"
        yield Finding("cache", "broken", f"{folder}: {error.strerror}", cure)
        return
    yield Finding("cache", "ok", str(folder))


def settings() -> Iterator[Finding]:
    """The environment variables hold what they may."""
    env.batch_invariant()
    yield Finding("settings", "ok", "MOE_OPS_* are as documented")


def tables() -> Iterator[Finding]:
    """Every table of tuned tiles can be read."""
    given = env.config_dir()
    for root in [PACKAGED] if given is None else [Path(given), PACKAGED]:
        if root != PACKAGED and not (root.is_dir() and os.access(root, os.R_OK | os.X_OK)):
            cure = "make it a folder that can be read, or unset MOE_OPS_CONFIG_DIR"
            yield Finding("tables", "broken", f"MOE_OPS_CONFIG_DIR is {root}, no such folder", cure)
            continue
        # Files of vLLM and SGLang lie in the root itself; ours in a folder for each device.
        files = sorted(file for file in root.glob("*/E=*,H=*.json") if not file.name.startswith("."))
        broken = []
        for file in files:
            try:
                load_table(file)
            except ConfigError as error:
                broken.append(error)
        if broken:
            yield Finding("tables", "broken", _one_line(broken[0]), "correct or remove the file; make it by tune")
        else:
            yield Finding("tables", "ok", f"{len(files)} in {root}")


def numerics() -> Iterator[Finding]:
    """A small call on every path there is gives what the reference does; compiling its kernels is part of it."""
    import moe_ops
    from moe_ops.cli.problems import describe_call
    from moe_ops.testing import assert_correct, random_inputs

    sizes = {"num_tokens": 64, "hidden": 256, "intermediate": 128, "experts": 8, "top_k": 2}
    device = describe(
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    )
    paths = ["auto"]
    if device.kind == "cuda":
        problem = describe_call((8, 2, 256, 128), 64, torch.bfloat16)
        paths = ["classic"] if tma_obstacle(problem, device) else ["tma", "classic"]
    for path in paths:
        name = f"small call, {'cpu' if device.kind == 'cpu' else path}"
        args = random_inputs(**sizes, dtype=torch.bfloat16, device=device.kind)
        try:
            out = moe_ops.fused_moe(*args.tensors().values(), path=path)
            assert_correct(out, args, round_up_projection=device.kind == "cpu")
        except AssertionError as error:
            yield Finding(name, "broken", f"wrong result: {_one_line(error)}", "report it with the output of env")
        except Exception as error:  # of Triton, its compiler, the driver
            found = f"{type(error).__name__}: {_one_line(error)}"
            yield Finding(name, "broken", found, "see the findings above; another version of Triton may help")
        else:
            yield Finding(name, "ok", "compiled, ran, and is right" if device.kind == "cuda" else "ran, and is right")


CHECKS = (torch_version, triton_version, driver, compiler, caches, settings, tables, numerics)


def _at_least(version: str, least: tuple[int, int]) -> bool:
    numbers = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in numbers) >= least
