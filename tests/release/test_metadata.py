"""What the files beside the code say of it: versions, pins, the citation, the list of what the sdist has."""

import ast
import re
from pathlib import Path

import pytest

import moe_ops
from tests.checkout import ROOT, tracked_files

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pin(name: str) -> str:
    """The version that the extra `dev` pins."""
    (version,) = [line.partition("==")[2] for line in PROJECT["optional-dependencies"]["dev"] if line.startswith(name)]
    assert version, f"{name} is not pinned"
    return version


def test_ruff_is_pinned_once():
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{pin('ruff')}"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}


def test_lint_installs_what_is_pinned():
    """scripts/bootstrap.py looks the pins up by a pattern."""
    found = re.findall(r"(?:ruff|mypy)==[\d.]+", (ROOT / "pyproject.toml").read_text())
    assert sorted(found) == [f"mypy=={pin('mypy')}", f"ruff=={pin('ruff')}"]


def test_floors_are_said_once():
    """What pyproject.toml asks for is what scripts/bootstrap.py installs and the README names."""
    floors = dict(re.findall(r"^(torch|triton)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    floors["transformers"] = PROJECT["optional-dependencies"]["hf"][0].partition(">=")[2]
    bootstrap = (ROOT / "scripts" / "bootstrap.py").read_text()
    readme = (ROOT / "README.md").read_text()
    for name, floor in floors.items():
        assert f'("{name}>={floor}",' in bootstrap
        assert re.search(rf"\b{name} \(?{re.escape(floor)} or newer", readme, re.IGNORECASE), f"{name} {floor}"
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in readme


def test_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert citation["version"] == moe_ops.__version__
    assert citation["license"] == PROJECT["license"]
    assert all(author["name"] for author in citation["authors"])
    for reference in citation["references"]:
        assert reference["title"] and reference["authors"] and ("url" in reference or "doi" in reference)


def test_changelog_has_the_version_or_says_unreleased():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" or heads[0].split()[0] == moe_ops.__version__


def test_version_is_read_without_importing_anything():
    """setuptools takes `attr` from the syntax tree, if what it finds there is a literal."""
    tree = ast.parse(Path(moe_ops.__file__).read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"]
    assert [ast.literal_eval(value) for value in values] == [moe_ops.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", moe_ops.__version__)


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in text and "Version 2.0, January 2004" in text


def test_extras_are_known_where_they_are_named():
    """Where a text or a message says what to install, the extra in its brackets is one that there is."""
    named = set()
    for file in tracked_files():
        if file.suffix in (".py", ".md"):
            named |= set(re.findall(r"moe-ops-tma\[(\w+)\]", (ROOT / file).read_text()))
    assert "bench" in named
    assert named <= set(PROJECT["optional-dependencies"])
