"""The sdist and the wheel: built once from a copy of the checkout, installed into a clean environment, and used there.

Nothing comes over the network: the build runs without isolation, and the clean environment borrows torch.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import moe_ops
from tests.checkout import ROOT, tracked_files
from tests.shared import made_once

NAME = f"moe_ops_tma-{moe_ops.__version__}"
# What setuptools adds to an sdist.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|moe_ops_tma\.egg-info/.*")


def run(*command: str | Path, **options) -> str:
    """What a command prints, if it succeeds."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was made from the sdist."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("build is not installed: pip install moe-ops-tma[dev]")
    return made_once(tmp_path_factory, "dist", lambda out: build(out, tmp_path_factory))


def build(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Builds both from a copy of the checkout."""
    checkout = tmp_path_factory.mktemp("checkout")
    for file in tracked_files():
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, checkout / file)
    # A build imports neither torch nor the package.
    traps = tmp_path_factory.mktemp("traps")
    for module in ("torch", "triton", "moe_ops"):
        (traps / f"{module}.py").write_text(f"raise SystemExit('the build imports {module}')")
    environment = {**os.environ, "PYTHONPATH": str(traps), "PIP_NO_INDEX": "1"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=traps, env=environment)


@pytest.fixture(scope="session")
def clean_python(built, tmp_path_factory) -> Path:
    """The interpreter of a new environment that has the wheel; torch and what it needs are borrowed."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    wheel = built / f"{NAME}-py3-none-any.whl"
    # With a checkout on PYTHONPATH pip would take the package for installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--no-compile", wheel, env=environment)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A folder that a .pth names is searched, but its own .pth files, such as an editable install's, are not read.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if (found := importlib.util.find_spec("torch")) is not None:
        borrowed.add(str(Path(found.origin).parents[1]))
    (packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return python


def wheel_files(built: Path) -> set[str]:
    """Names in the wheel, without its metadata."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_wheel_is_the_package_and_nothing_else(built):
    """Tables of tuned tiles and py.typed with it; neither C++ (docs/cpp.md: built from a checkout) nor tests."""
    expected = {
        str(file)
        for file in tracked_files()
        if file.parts[0] == "moe_ops" and (file.suffix in (".py", ".json") or file.name == "py.typed")
    }
    assert wheel_files(built) == expected
    assert any(name.startswith("moe_ops/tuning/configs/") for name in expected) and "moe_ops/py.typed" in expected


def test_sdist_is_the_whole_checkout(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist.getmembers() if member.isfile()}
    assert {name for name in names if not GENERATED.fullmatch(name)} == set(map(str, tracked_files()))


def test_metadata(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        metadata = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
        assert f"{NAME}.dist-info/licenses/LICENSE" in wheel.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("moe-ops-tma", moe_ops.__version__)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in required] == ["torch", "triton"]


def test_twine_has_nothing_to_say(built):
    pytest.importorskip("twine", reason="twine is not installed: pip install moe-ops-tma[dev]")
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *sorted(built.iterdir()))
    assert said.count("PASSED") == 2


def test_installed_wheel_works(clean_python, tmp_path):
    """Imported from where it was installed; the op computes; the tables and the command line are there."""
    code = """
import importlib.metadata, json, sys
import torch, moe_ops
from moe_ops.cli import main
from moe_ops.testing import assert_correct, random_inputs
args = random_inputs(num_tokens=9, hidden=64, intermediate=40, experts=4, top_k=2)
assert_correct(moe_ops.fused_moe(*args.tensors().values()), args)
facts = {"file": moe_ops.__file__, "prefix": sys.prefix, "version": importlib.metadata.version("moe-ops-tma")}
print(json.dumps(facts))
sys.exit(main(["explain", "--model", "qwen3-30b-a3b", "--device", "h100", "--tokens", "1024"]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    said = run(clean_python, "-c", code, cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"})
    facts, explained = json.loads(said.splitlines()[0]), said.splitlines()[1:]
    assert Path(facts["file"]).is_relative_to(facts["prefix"]) and facts["version"] == moe_ops.__version__
    assert any("E=128,H=2048,I=768" in line for line in explained), said
