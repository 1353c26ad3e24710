"""Build the C++ library and the runner of AOTInductor packages with one compiler command each.

    python scripts/build_cpp.py [--out build/cpp] [--library-only] [--namespace moe_ops]

Prints each command. Needs g++ or clang++ ($CXX), and torch in the Python that runs it; no CMake.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc_stubs"
REGISTRATION = "registration.cpp"
LIBRARY_SOURCES = (
    REGISTRATION, "checks.cpp", "routing.cpp", "products.cpp", "fused_moe.cpp", "launch_table.cpp", "cuda_driver.cpp",
    "fused_moe_cuda.cpp",
)  # fmt: skip
WARNINGS = ("-Wall", "-Wextra")
# A compiler may link libstdc++ in, and torch has brought another: what is in an archive stays inside, or locales of one
# meet streams of the other.
ARCHIVES = "-Wl,--exclude-libs,ALL"
# The oldest torch that the library loads into, 2.11, whatever version it is built with.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def torch_root() -> Path:
    """The folder of torch."""
    import torch

    return Path(torch.__path__[0])


def _library_options(namespace: str) -> list[str]:
    return [
        "-std=c++17", "-O3", *WARNINGS, "-fPIC", "-fvisibility=hidden", TARGET_VERSION,
        f"-DMOE_OPS_NAMESPACE={namespace}", f"-isystem{torch_root() / 'include'}",
    ]  # fmt: skip


def library_command(
    out: Path, namespace: str = "moe_ops", sources: Sequence[str | Path] = LIBRARY_SOURCES
) -> list[str]:
    """Builds the library as `out`, from its sources, or from some of them and the objects of the others."""
    libraries = torch_root() / "lib"
    return [
        compiler(), *_library_options(namespace), "-shared", *(str(SOURCES / name) for name in sources),
        f"-L{libraries}", "-ltorch_cpu", "-ldl", ARCHIVES, f"-Wl,-rpath,{libraries}", "-o", str(out),
    ]  # fmt: skip


def object_command(source: str, out: Path) -> list[str]:
    """Builds a source of the library as the object `out`, for tests that build it twice.

    Any but `REGISTRATION`, which has the namespace in it.
    """
    return [compiler(), *_library_options("moe_ops"), "-c", str(SOURCES / source), "-o", str(out)]


def runner_command(out: Path) -> list[str]:
    """Builds the runner as `out`."""
    torch = torch_root()
    return [
        compiler(), "-std=c++17", "-O1", *WARNINGS, f"-isystem{torch / 'include'}",
        f"-isystem{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}", str(SOURCES / "run_package.cpp"),
        # libtorch.so brings the GPU libraries of a CUDA build along, which nothing here refers to by name.
        f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10", "-ldl",
        f"-Wl,-rpath,{torch / 'lib'}", "-o", str(out),
    ]  # fmt: skip


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build moe_ops' C++ library and the runner of AOTInductor packages.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cpp", help="folder of the results")
    parser.add_argument("--library-only", action="store_true", help="leave the runner out")
    parser.add_argument("--namespace", default="moe_ops", help="the operators' namespace")
    options = parser.parse_args()
    if compiler() is None:
        print(
            "error: no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++), or set CXX", file=sys.stderr
        )
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    commands = [library_command(options.out / "libmoe_ops.so", options.namespace)]
    if not options.library_only:
        commands.append(runner_command(options.out / "run_package"))
    for command in commands:
        print("+", shlex.join(command), flush=True)
        if subprocess.run(command).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
