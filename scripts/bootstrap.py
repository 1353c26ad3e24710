"""Make .venv ready for one Makefile target: python3 scripts/bootstrap.py TARGET.

Standard library only. The Makefile has checked that the Python is new enough.

A machine whose Python already has a GPU build of torch keeps it: .venv then sees that Python's packages, and pip runs
only for what is missing. Any other machine gets a CPU build of torch. What was done is noted in .venv/moe_ops.json, so
the next run returns at once unless pyproject.toml, setup.py, this file (pip runs again) or the interpreter (.venv is
made anew) changed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
NOTE = VENV / "moe_ops.json"
PIP_LOG = VENV / "pip.log"

# The default index's newest torch brings several GB of CUDA packages, so this version comes first, by itself.
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Target: (level, extra, builds C++ while it runs). A .venv made for one level serves every target up to it.
TARGETS = {
    "lint": (2, "dev", False),
    "demo": (1, "hf", False),
    "examples": (1, "hf", True),
    "cpp": (1, "hf", True),
    "test": (2, "dev", True),
    "test-triton-floor": (2, "dev", False),
}
# Module: (requirement, level from which it is wanted, whether the target is pointless without it).
MODULES = {
    "torch": ("torch>=2.11", 1, True),
    "triton": ("triton>=3.6", 1, True),
    "numpy": ("numpy", 1, False),
    "transformers": ("transformers>=5.17", 1, False),
    "pytest": ("pytest>=8", 2, True),
    "hypothesis": ("hypothesis", 2, True),
    "xdist": ("pytest-xdist", 2, False),
    "pytest_timeout": ("pytest-timeout", 2, False),
}


NO_VENV_CURE = "install it (Debian, Ubuntu: apt install python3-venv) or choose another PYTHON"
NOT_OURS = f"{VENV} was not made by this Makefile: move it away, or remove it with `make clean`"


class SetupError(Exception):
    """A problem to report to the user as one line: what is wrong, and the cure."""


def check_compiler(names: tuple[str | None, ...], user: str) -> None:
    """torch.compile and Triton build C or C++ at run time: find out before the download, not after."""
    if not any(shutil.which(name) for name in names if name):
        package = "g++" if "g++" in names else "gcc"
        raise SetupError(
            f"no compiler found, {user} needs one: install {package} (Debian, Ubuntu: apt install {package})"
        )
    folders = (sysconfig.get_config_var("INCLUDEPY"), sysconfig.get_path("include"))
    if not any((Path(folder) / "Python.h").exists() for folder in folders if folder):
        raise SetupError(f"Python.h is missing, {user} needs it: install python3-dev (Fedora: python3-devel)")


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, or None; reads metadata, imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_modules(level: int) -> list[str]:
    """Modules of `level` that this interpreter lacks or has too old."""
    lacking = []
    for module, (requirement, wanted_from, _) in MODULES.items():
        if level < wanted_from or (module == "triton" and sys.platform != "linux"):
            continue
        name, _, floor = requirement.partition(">=")
        found = [int(n) for n in re.findall(r"\d+", version_of(name) or "")] if floor else []
        too_old = bool(found) and found < [int(n) for n in floor.split(".")]
        if importlib.util.find_spec(module) is None or too_old:
            lacking.append(module)
    return lacking


def gpu_torch_version() -> str | None:
    """Version of this interpreter's torch if it is a GPU build that is new enough, else None."""
    if importlib.util.find_spec("torch") is None:
        return None
    probe = "import torch as t; print('torch', t.__version__, bool(t.version.cuda or getattr(t.version, 'hip', None)))"
    match = re.search(r"^torch ((\d+)\.(\d+)\S*) True$", run([sys.executable, "-c", probe]).stdout, re.MULTILINE)
    return match.group(1) if match and (int(match.group(2)), int(match.group(3))) >= (2, 11) else None


def fingerprints() -> tuple[str, str]:
    """(what .venv is made from, what is installed into it): hashes to notice a change by."""
    base = [str(ROOT), sys.executable, sys.version, str(version_of("torch"))]
    content = [(ROOT / file).read_text() for file in ("pyproject.toml", "setup.py", "scripts/bootstrap.py")]
    return tuple(hashlib.sha256("\0".join(parts).encode()).hexdigest() for parts in (base, content))


def read_note() -> dict:
    """The note of an earlier run, or {}."""
    try:
        return json.loads(NOTE.read_text())
    except (OSError, ValueError):
        return {}


def create_venv(base: str) -> dict:
    """Make .venv, without pip, and return its note. An earlier one of ours goes; somebody else's stays."""
    if VENV.exists():
        if not NOTE.exists():
            raise SetupError(NOT_OURS)
        shutil.rmtree(VENV)
    VENV.mkdir()
    # First of all, so that a run after an interrupted one knows .venv as ours; without "base" it is then made anew.
    NOTE.write_text(json.dumps({"python": sys.executable}))
    note = {"base": base, "python": sys.executable, "level": -1, "gpu_torch": gpu_torch_version()}
    shared = ["--system-site-packages"] if note["gpu_torch"] else []
    if run([sys.executable, "-m", "venv", "--without-pip", *shared, str(VENV)]).returncode:
        raise SetupError(f"{sys.executable} has no working venv module: {NO_VENV_CURE}")
    if note["gpu_torch"]:
        # --system-site-packages shows the BASE interpreter's packages; this interpreter may itself be a virtual
        # environment, so its package folders are named as well.
        folders = [p for p in sys.path if {"site-packages", "dist-packages"} & set(Path(p).parts)]
        site = run([str(VENV_PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
        (Path(site) / "moe_ops_checkout.pth").write_text("\n".join([str(ROOT), *folders]) + "\n")
    NOTE.write_text(json.dumps(note))
    return note


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command and return it with its output as text."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def reachable(url: str, seconds: float = 3) -> bool:
    """Whether a URL answers within some seconds, name look-up included (urlopen's own timeout leaves that out)."""
    answers = []

    def probe() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except Exception:  # whatever is wrong, pip's default index is the answer
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def pip(what: str, *arguments: str) -> None:
    """Install with .venv's pip. Output goes to .venv/pip.log; a failure becomes one line."""
    has_pip = run([str(VENV_PYTHON), "-m", "pip", "--version"]).returncode == 0
    if not has_pip and run([str(VENV_PYTHON), "-m", "ensurepip", "--default-pip"]).returncode:
        raise SetupError(f"{sys.executable} has no ensurepip, so .venv gets no pip: {NO_VENV_CURE}")
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments]
    print(f"installing {what}", flush=True)
    start = time.time()
    with PIP_LOG.open("w+", errors="replace") as log:
        # PIP_USER would send the packages to the home folder.
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PIP_USER": "0"})
        while process.poll() is None:
            time.sleep(0.2)
            if sys.stdout.isatty():
                print(f"  {time.time() - start:.0f} s", end="\r", flush=True)
        if process.returncode:
            log.seek(0)
            raise SetupError(f"pip could not install {what}: {pip_failure(log.read())} (pip's words: .venv/pip.log)")


def pip_failure(log: str) -> str:
    """Cause and cure, from what pip printed."""
    if "No space left" in log:
        return "the disk is full; free about 4 GB"
    if re.search(r"[Cc]onnection|Temporary failure|Network is unreachable|ProxyError|SSLError|timed out", log):
        return "no package index answers; check the network, or set PIP_INDEX_URL or HTTPS_PROXY"
    if "No matching distribution" in log:
        this = f"Python {platform.python_version()} on {platform.platform()}"
        return f"no package index answers, or none has it for {this}; check the network, or choose another PYTHON"
    return (re.findall(r"^ *(?:ERROR|error): (.*)", log, re.MULTILINE) or ["pip failed"])[0]


def install_linters() -> None:
    """The ruff and mypy that pyproject.toml pins."""
    pins = re.findall(r"(?:ruff|mypy)==[\d.]+", (ROOT / "pyproject.toml").read_text())
    probe = "import importlib.metadata as m, sys; print(*(f'{n}=={m.version(n)}' for n in sys.argv[1:]))"
    names = [pin.partition("==")[0] for pin in pins]
    if run([str(VENV_PYTHON), "-c", probe, *names]).stdout.split() != pins:
        pip(" and ".join(pins), *pins)


def install_cpu(extra: str) -> None:
    """Torch's CPU build first, then the package (editable) with its extra, torch held at that version."""
    if not list(VENV.glob(f"lib/python*/site-packages/{CPU_TORCH.replace('==', '-')}*.dist-info")):
        index = ["--index-url", CPU_INDEX] if reachable(CPU_INDEX + "/torch/") else []
        pip(f"{CPU_TORCH} (CPU build, about 200 MB)", CPU_TORCH, *index)
    pip(f"this package and what [{extra}] needs (about 500 MB)", "--editable", f".[{extra}]", CPU_TORCH)


def install_gpu(level: int, torch_version: str) -> None:
    """Only what this machine's Python lacks. Without a network, go on without what is not indispensable."""
    lacking = missing_in_venv(level)
    if not lacking:
        return
    try:
        pip(", ".join(lacking), "--retries", "1", *[MODULES[m][0] for m in lacking], f"torch=={torch_version}")
    except SetupError as error:
        if any(MODULES[m][2] for m in lacking):
            raise
        print(f"note: going on without {', '.join(lacking)}: {error}", flush=True)


def missing_in_venv(level: int) -> list[str]:
    """`missing_modules`, asked of .venv's interpreter."""
    answer = run([str(VENV_PYTHON), __file__, "--missing", str(level)]).stdout
    return json.loads(answer.splitlines()[-1])


def bootstrap(target: str) -> int:
    """Bring .venv to the level that `target` needs."""
    level, extra, compiles = TARGETS[target]
    note = read_note()
    if Path(sys.prefix).resolve() == VENV.resolve():
        # Somebody activated .venv: it must not be what .venv is made from.
        if "python" not in note:
            raise SetupError(NOT_OURS)
        return subprocess.call([note["python"], __file__, target])
    if compiles:
        check_compiler((os.environ.get("CXX"), "g++", "clang++"), "torch.compile")
    base, content = fingerprints()
    if note.get("base") != base or not VENV_PYTHON.exists():
        note = create_venv(base)
    if note.get("content") != content:
        note.update(content=content, level=-1)
    if note["level"] < level:
        if note["gpu_torch"]:
            check_compiler((os.environ.get("CC"), "gcc", "clang"), "Triton")
            install_gpu(level, note["gpu_torch"])
        else:
            install_cpu(extra)
        check = run([str(VENV_PYTHON), "-c", "import torch"])
        if check.returncode:
            reason = (check.stdout.strip().splitlines() or ["no reason given"])[-1]
            raise SetupError(f"torch does not import in .venv ({reason}): `make clean`, then again")
        note["level"] = level
        NOTE.write_text(json.dumps(note))
    if target == "lint":
        install_linters()
    return 0


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status."""
    if arguments[0] == "--missing":
        print(json.dumps(missing_modules(int(arguments[1]))))
        return 0
    try:
        return bootstrap(arguments[0])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}: check the disk space and the permissions of {ROOT}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to go on", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
