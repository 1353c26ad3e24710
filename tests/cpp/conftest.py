"""The C++ library and its runner, built once a run. Skipped, with the reason, only where no compiler exists."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# A warm cache knows an op by its name alone and would hide a change of its schema.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from scripts import build_cpp
from tests.amount import ALL
from tests.shared import made_once

ROOT = Path(__file__).resolve().parents[2]
# Where the library's second copy has its ops: Python's are in the same process, to be compared with.
BESIDE = "moe_ops_cpp"


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        library: the library, with the ops' own namespace.
        beside: the library with the ops in namespace `BESIDE`.
        runner: the runner of packages.
    """

    library: Path
    beside: Path
    runner: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Built:
    """The library, twice, and the runner. A warning of the compiler is an error."""
    require_compiler()
    folder = made_once(tmp_path_factory, "cpp", build)
    return Built(folder / "libmoe_ops.so", folder / "libmoe_ops_cpp.so", folder / "run_package")


def require_compiler() -> None:
    """Skips the test where nothing can be built."""
    if build_cpp.compiler() is None:
        pytest.skip("no C++ compiler: install g++ (Debian, Ubuntu: apt install g++), or set CXX")


def build(folder: Path) -> None:
    """With MOE_OPS_TESTS=all each by its one command; otherwise what both libraries have in common is compiled once."""
    libraries = {"libmoe_ops.so": "moe_ops", "libmoe_ops_cpp.so": BESIDE}
    sources, objects = build_cpp.LIBRARY_SOURCES, []
    if not ALL:
        objects = [folder / f"{name}.o" for name in sources if name != build_cpp.REGISTRATION]
        sources = build_cpp.REGISTRATION, *objects
    run_all([build_cpp.runner_command(folder / "run_package"), *(
        build_cpp.object_command(file.stem, file) for file in objects)])  # fmt: skip
    run_all([build_cpp.library_command(folder / file, name, sources) for file, name in libraries.items()])


def run_all(commands: list[list[str]]) -> None:
    """Runs commands of the compiler, as many at a time as there are processors. A warning is an error."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = list(threads.map(lambda command: subprocess.run(
            [*command, "-Werror"], stderr=subprocess.PIPE, text=True), commands))  # fmt: skip
    assert all(process.returncode == 0 for process in done), "\n".join(process.stderr for process in done)[-4000:]


@pytest.fixture(scope="session")
def ops(built):
    """The C++ ops, beside Python's."""
    torch.ops.load_library(str(built.beside))
    return getattr(torch.ops, BESIDE)


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    """Runs a command from a folder of no importance, with the checkout's package in sight."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def run_python():
    """Runs Python code in a process of its own; its arguments are in sys.argv[1:]."""

    def run_code(code: str, *arguments: object, **env: str) -> str:
        done = run(sys.executable, "-c", code, *arguments, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run_code


@pytest.fixture
def run_command():
    """Runs a command."""
    return run
