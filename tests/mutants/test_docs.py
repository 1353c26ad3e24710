"""In the tables of docs/testing.md every mutant has its row."""

import re

import pytest

from tests.mutants.emulators import WRONG
from tests.mutants.hopper import HOPPER_MUTATIONS, RACES
from tests.mutants.kernels import ROOT
from tests.mutants.mutations import MUTATIONS

TEXT = (ROOT / "docs" / "testing.md").read_text()


@pytest.mark.parametrize(
    "mark,mutants", [("emulators", WRONG), ("kernels", MUTATIONS), ("hopper", [*HOPPER_MUTATIONS, *RACES])]
)
def test_tables_have_every_mutant(mark, mutants):
    table = TEXT.split(f"<!-- {mark}: begin -->")[1].split(f"<!-- {mark}: end -->")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [mutant.name for mutant in mutants]
    assert ": lives |" not in table
