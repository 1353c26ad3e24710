"""The files of this checkout."""

import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def tracked_files() -> tuple[Path, ...]:
    """Paths, from the root, of the files that git has, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("this is no checkout of git")
    return tuple(path for name in sorted(done.stdout.split("\0")) if name and (ROOT / (path := Path(name))).is_file())
