"""The C++ library and its runner, built once a run. Skipped, with the reason, only where no compiler exists."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# A warm cache knows an op by its name alone and would hide a change of its schema.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from scripts import build_cpp
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
    commands = (
        build_cpp.library_command(folder / "libmoe_ops.so"),
        build_cpp.library_command(folder / "libmoe_ops_cpp.so", BESIDE),
        build_cpp.runner_command(folder / "run_package"),
    )
    running = [subprocess.Popen([*command, "-Werror"], stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)[-4000:]


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
