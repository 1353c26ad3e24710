"""A package made in Python runs in a process without Python, as docs/cpp.md says, and its results are Python's."""

import sys

import pytest
import torch

from tests.amount import in_full
from tests.cpp.conftest import ROOT, run
from tests.shared import made_once


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder with what the example writes."""

    def make(folder):
        done = run(sys.executable, ROOT / "examples" / "package_for_cpp.py", "--out", folder)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "package", make)


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


# Every option of an unquantised call, both ops and route in one package; inputs, expected results and package go to
# the folder in sys.argv[1].
OPTIONS = """
import sys, torch, moe_ops
from moe_ops.testing import random_inputs
args = random_inputs(
    num_tokens=6, hidden=24, intermediate=16, experts=4, top_k=3, dtype=torch.bfloat16, bias=True, n_major=True,
    index_dtype=torch.int64, activation="swigluoai", activation_alpha=1.1, activation_limit=0.7,
    gate_up_layout="interleaved", routed_scaling_factor=2.5, apply_router_weight_on_input=True, reduce_topk=False,
    deterministic=False, path="reference", out_dtype=torch.float32,
    expert_map=torch.tensor([2, -1, 0, 3], dtype=torch.int32),
)
tensors = args.tensors()
options = {name: getattr(args, name) for name in args.__slots__ if name not in tensors}
class Calls(torch.nn.Module):
    def forward(self, *given):
        call = dict(zip(tensors, given, strict=True)) | options
        out = torch.empty(6, 3, 24)
        torch.ops.moe_ops.fused_moe_tma_(out, **call)
        return torch.ops.moe_ops.fused_moe_tma(**call), out, *moe_ops.route(call["topk_ids"], 4, 2, call["expert_map"])
with torch.no_grad():
    given = tuple(tensors.values())
    program = torch.export.export(Calls(), given)
    torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1] + "/options.pt2")
    # The exact results of path="reference" are more than the C++ kernel promises.
    options["path"] = "auto"
    torch.save(given, sys.argv[1] + "/inputs.pt")
    torch.save(Calls()(*given), sys.argv[1] + "/expected.pt")
"""


@in_full
def test_every_option(built, tmp_path, run_python):
    run_python(OPTIONS, tmp_path)
    command = (built.runner, tmp_path / "options.pt2", tmp_path / "inputs.pt", "--library", built.library)
    done = run(*command, "--output", tmp_path / "output.pt")
    assert done.returncode == 0, done.stderr
    got, expected = torch.load(tmp_path / "output.pt"), torch.load(tmp_path / "expected.pt")
    assert len(got) == len(expected) == 6 and got[0].abs().max() > 0.1
    for result, want in zip(got, expected, strict=True):
        torch.testing.assert_close(result, want, rtol=2e-2, atol=2e-2)
    assert all(map(torch.equal, got[2:], expected[2:]))


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
