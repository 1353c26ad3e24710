"""The checks kill every mutation of the kernels: in the interpreter, those in Gluon emulated and on a GPU.

Each mutated copy of the package is checked in a process of its own, whose crash or hang counts as well.
"""

import ast
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch

from tests import amount
from tests.mutants.hopper import HOPPER_MUTATIONS, RACES
from tests.mutants.kernels import ROOT, Outcome, copy_package, judges
from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ALL = [*MUTATIONS, *HOPPER_MUTATIONS, *RACES]
# Of the kernels in Gluon, which the emulator takes longer for: numbers that are not there yet, of both kinds.
USUAL_HOPPER = ("half_the_bytes_announced", "partial_sum_used_too_early")
USUAL = [mutation for mutation in MUTATIONS if not mutation.in_full]
USUAL += [mutation for mutation in ALL if mutation.name in USUAL_HOPPER]
# A check of each kernel, which the others follow.
HOPPER_FIRSTS = ("pingpong plain", "blockscaled fp8_block", "packed int4", "mixed int8")


def name(mutation: Mutation | None) -> str:
    """Of the mutant; None is the copy that is not mutated, which must pass."""
    return mutation.name if mutation else "unmutated"


@pytest.mark.parametrize("mutation", ALL, ids=name)
def test_source_is_still_there(mutation, tmp_path):
    """Exactly once, and the mutated source is Python."""
    (tmp_path / "kernels").mkdir()
    shutil.copy(ROOT / "moe_ops" / "kernels" / f"{mutation.file}.py", tmp_path / "kernels")
    ast.parse(mutation.apply(tmp_path))


def test_the_tree_is_not_touched(tmp_path):
    path = ROOT / "moe_ops" / "kernels" / f"{MUTATIONS[0].file}.py"
    before = path.read_text()
    copy_package(tmp_path, MUTATIONS[0])
    assert path.read_text() == before
    assert len({mutation.name for mutation in ALL}) == len(ALL)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[Callable[[Mutation | None], Outcome]]:
    """Outcome of a mutation. Two copies are checked at a time, or one where pytest-xdist runs tests side by side."""
    folder = tmp_path_factory.mktemp("copies")
    shared = "PYTEST_XDIST_WORKER" in os.environ
    with judges(1 if shared else 2) as judge:

        @functools.cache
        def submit(mutation: Mutation | None) -> Future:
            return judge(folder / name(mutation), mutation, mutation.first if mutation else "classic plain")

        if not shared:
            for item in request.session.items:
                skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
                if "outcomes" in getattr(item, "fixturenames", ()) and not skipped:
                    submit(item.callspec.params["mutation"])
        yield lambda mutation: submit(mutation).result()


@pytest.mark.parametrize("mutation", amount.params([None, *ALL], USUAL), ids=name)
def test_interpreter_kills(mutation, outcomes):
    judged(outcomes(mutation), mutation)


@amount.in_full
@pytest.mark.parametrize("first", HOPPER_FIRSTS)
def test_unmutated_kernels_in_gluon_pass(first, tmp_path):
    with judges(1) as judge:
        judged(judge(tmp_path / "copy", None, first).result(), None)


def judged(outcome: Outcome, mutation: Mutation | None) -> None:
    """A mutant must be killed; the copy that is none must not."""
    assert outcome.killed == (mutation is not None), f"{outcome}\n{outcome.output}"
    # A copy that cannot even be imported says nothing about the checks.
    assert outcome.check


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="wgmma is Hopper's")
@pytest.mark.parametrize("mutation", [None, *HOPPER_MUTATIONS], ids=name)
def test_gpu_kills(mutation, tmp_path):
    # The copy that is not mutated passes the checks of each kernel.
    firsts = [mutation.first] if mutation else HOPPER_FIRSTS
    with judges(1, interpret=False) as judge:
        for first in firsts:
            judged(judge(tmp_path / first.replace(" ", "_"), mutation, first).result(), mutation)
