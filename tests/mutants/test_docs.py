"""What docs/testing.md says of tests is so: its example runs, the tests it names exist, every mutant has its row."""

import re

import pytest

from tests.mutants.emulators import WRONG
from tests.mutants.kernels import ROOT
from tests.mutants.mutations import GPU_MUTATIONS, MUTATIONS

TEXT = (ROOT / "docs" / "testing.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


def test_example(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("file,test", NAMED)
def test_named_tests_exist(file, test):
    assert f"\ndef {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("mark,mutants", [("emulators", WRONG), ("kernels", MUTATIONS), ("gpu", GPU_MUTATIONS)])
def test_tables_have_every_mutant(mark, mutants):
    table = TEXT.split(f"<!-- {mark}: begin -->")[1].split(f"<!-- {mark}: end -->")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [mutant.name for mutant in mutants]
    assert ": lives |" not in table
