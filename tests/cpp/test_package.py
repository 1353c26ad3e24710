"""A package made in Python runs in a process without Python, as docs/cpp.md says, and its results are Python's."""

import sys

import pytest
import torch

from tests.cpp.conftest import ROOT, run

pytestmark = pytest.mark.xdist_group("cpp")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder with what the example writes."""
    folder = tmp_path_factory.mktemp("package")
    done = run(sys.executable, ROOT / "examples" / "package_for_cpp.py", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run_package(built, package):
    """Runs the package with the runner."""

    def call(*options, inputs=package / "inputs.pt", library=True, **env):
        loaded = ("--library", built.library) if library else ()
        return run(built.runner, package / "block.pt2", inputs, *loaded, *options, **env)

    return call


def test_result_is_pythons(run_package, package, tmp_path):
    output = tmp_path / "output.pt"
    done = run_package("--expect", package / "expected.pt", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("output 0: float [5, 64] sum ") and done.stdout.endswith("as expected\n")
    (got,), (expected,) = torch.load(output), torch.load(package / "expected.pt")
    torch.testing.assert_close(got, expected)


def test_no_python_in_the_process(run_package, package, built):
    """Neither among the libraries that were linked, nor among those that were loaded while it ran."""
    done = run_package("--expect", package / "expected.pt", LD_DEBUG="files")
    assert done.returncode == 0
    assert str(built.library) in done.stderr and "libtorch_cpu.so" in done.stderr
    assert "libpython" not in done.stderr and "libtorch_python" not in done.stderr


def test_other_numbers_of_tokens(run_package, tmp_path):
    for tokens in (1, 300):
        torch.save((torch.randn(tokens, 64),), tmp_path / "inputs.pt")
        done = run_package(inputs=tmp_path / "inputs.pt")
        assert done.returncode == 0 and f"[{tokens}, 64]" in done.stdout, done.stderr


def test_wrong_results_are_noticed(run_package, package, tmp_path):
    (expected,) = torch.load(package / "expected.pt")
    for wrong in (expected * 1.001, expected[:-1], expected.double(), torch.where(expected > 0, expected, torch.nan)):
        torch.save([wrong], tmp_path / "wrong.pt")
        done = run_package("--expect", tmp_path / "wrong.pt")
        assert done.returncode == 1 and done.stdout.endswith("NOT as expected\n"), done.stdout


def test_without_the_library(run_package):
    done = run_package(library=False)
    assert done.returncode == 2 and "Could not find schema for moe_ops::fused_moe_tma" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "usage: run_package PACKAGE.pt2 INPUTS.pt"),
        (("a", "b", "--library"), "--library needs a value"),
        (("a", "b", "--nothing", "c"), "unknown option --nothing"),
        (("a", "b", "--library", "/nowhere.so"), "/nowhere.so"),
        (("/nowhere.pt2", "b"), "zip archive"),
    ],
)
def test_bad_arguments(built, arguments, words):
    done = run(built.runner, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
