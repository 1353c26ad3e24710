"""Run one Makefile target inside .venv: .venv/bin/python scripts/tasks.py TARGET. Standard library only.

scripts/bootstrap.py has made .venv ready before. Every step of a target runs even after one has failed, and the exit
status is 1 if any did.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = ROOT / ".venv" / "triton-floor"
# The oldest Triton that moe_ops supports; its interpreter cannot loop up to a loaded bound on NumPy 2.4 or newer.
FLOOR_TRITON = "3.6.0"
FLOOR_REQUIREMENTS = [f"triton=={FLOOR_TRITON}", "numpy<2.4"]
_GPU_TEST_GIGABYTES = 12
BIG = "tests/gpu/test_big.py"
# What every test run sees: no compiled code from an earlier run, no model download.
TEST_ENV = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "HF_HUB_OFFLINE": "1"}


def run(*command: str, env: dict[str, str] | None = None) -> bool:
    """Run .venv's Python with arguments, show the command, and say whether it succeeded."""
    env = env or {}
    shown = [f"{name}={value}" for name, value in env.items()] + ["python", *command]
    print("+", " ".join(shown), flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **env}).returncode == 0


def inductor_env() -> dict[str, str]:
    """torch.compile looks for g++ only; point it to clang++ where that is the compiler."""
    if "CXX" in os.environ or shutil.which("g++") or not shutil.which("clang++"):
        return {}
    return {"CXX": "clang++"}


def workers(count: int = 2) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment for `count` test processes, where pytest-xdist is there."""
    if importlib.util.find_spec("xdist") is None:
        print("note: pytest-xdist is not installed, so the tests run in one process", flush=True)
        return [], {}
    # Processes of many threads each would fight over the cores.
    return ["-n", str(count)], {"OMP_NUM_THREADS": "1"}


def has_cuda_gpu() -> bool:
    """Whether .venv's torch can use a CUDA GPU; torch's CPU build, which bootstrap installs, is not asked."""
    if not json.loads((ROOT / ".venv" / "moe_ops.json").read_text())["gpu_torch"]:
        return False
    probe = "import sys, torch; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))"
    return subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0


def gpu_gigabytes() -> int:
    """Memory of the first CUDA GPU."""
    probe = "import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)"
    return int(subprocess.run([sys.executable, "-c", probe], stdout=subprocess.PIPE, check=True).stdout)


def demo() -> bool:
    """A real model through the op, on the GPU if there is one."""
    return run("examples/generate.py")


def test() -> bool:
    """All tests: on the CPU, through Triton's interpreter, and on a CUDA GPU where there is one."""
    parallel, threads = workers()
    env = {**TEST_ENV, **threads, **inductor_env()}
    # Triton decides when it is imported whether it interprets, so those tests need a process of their own.
    results = [
        run("-m", "pytest", "tests", "-m", "not gpu", "--ignore=tests/interp", *parallel, env=env),
        run("-m", "pytest", "tests/interp", *parallel, env={**env, "TRITON_INTERPRET": "1"}),
    ]
    if has_cuda_gpu():
        # Compiling for the GPU takes most of the time, and host cores; a process keeps what its largest test took.
        parallel, threads = workers(max(1, min(10, (os.cpu_count() or 1) // 2, gpu_gigabytes() // _GPU_TEST_GIGABYTES)))
        env = {**TEST_ENV, **threads, **inductor_env()}
        gpu_tests = ("-m", "pytest", "-m", "gpu")
        results.append(run(*gpu_tests, "tests/gpu", "tests/mutants", f"--ignore={BIG}", *parallel, env=env))
        # One process has the memory of the device.
        results.append(run(*gpu_tests, BIG, *workers(1)[0], env=env))
    else:
        print("note: no usable CUDA GPU, so the GPU tests did not run", flush=True)
    return all(results)


def install_floor() -> bool:
    """Put the oldest supported Triton into its own folder, once."""
    stamp = FLOOR / "requirements.txt"
    wanted = "\n".join([*FLOOR_REQUIREMENTS, sys.version])
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    shutil.rmtree(FLOOR, ignore_errors=True)
    what = " and ".join(FLOOR_REQUIREMENTS)
    print(f"installing {what} into {FLOOR.relative_to(ROOT)}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FLOOR)]
    done = subprocess.run([*command, *FLOOR_REQUIREMENTS], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        print(f"error: {what} cannot be installed: check the network ({reason})", file=sys.stderr)
        return False
    stamp.write_text(wanted)
    return True


def test_triton_floor() -> bool:
    """The compile and interpreter tests with the oldest supported Triton."""
    if not install_floor():
        return False
    path = os.pathsep.join(filter(None, [str(FLOOR), os.environ.get("PYTHONPATH")]))
    check = f"import sys, triton; print('triton', triton.__version__); sys.exit(triton.__version__ != '{FLOOR_TRITON}')"
    if not run("-c", check, env={"PYTHONPATH": path}):
        print(f"error: triton is not {FLOOR_TRITON}: `make clean`, then again", file=sys.stderr)
        return False
    parallel, threads = workers()
    env = {"PYTHONPATH": path, **TEST_ENV, **threads}
    results = [
        run("-m", "pytest", "tests/aot", "-m", "not gpu", *parallel, env=env),
        run("-m", "pytest", "tests/interp", *parallel, env={**env, "TRITON_INTERPRET": "1"}),
    ]
    return all(results)


def examples() -> bool:
    """Every example, with small settings."""
    env = {"MOE_OPS_EXAMPLE_QUICK": "1", "HF_HUB_OFFLINE": "1", **inductor_env()}
    files = sorted((ROOT / "examples").glob("*.py"))
    results = {file.name: run(f"examples/{file.name}", env=env) for file in files}
    failed = [name for name, ok in results.items() if not ok]
    print(f"examples: {len(results) - len(failed)} passed" + (f", failed: {', '.join(failed)}" if failed else ""))
    return bool(results) and not failed


def cpp() -> bool:
    """The C++ library and the runner of AOTInductor packages."""
    return run("scripts/build_cpp.py")


def lint() -> bool:
    """Style, formatting and types."""
    results = [run("-m", "ruff", "check", "."), run("-m", "ruff", "format", "--check", "."), run("-m", "mypy")]
    return all(results)


def main() -> int:
    """Run the target named on the command line and say how long it took."""
    target = sys.argv[1]
    tasks = {
        "demo": demo,
        "test": test,
        "test-triton-floor": test_triton_floor,
        "examples": examples,
        "cpp": cpp,
        "lint": lint,
    }
    start = time.monotonic()
    try:
        passed = tasks[target]()
    except KeyboardInterrupt:
        passed = False
    print(f"{target}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
