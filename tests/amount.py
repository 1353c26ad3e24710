"""How much runs: what a developer waits for, or with MOE_OPS_TESTS=all, as in .ci/run, everything.

What is left out differs from something that runs in a combination alone: docs/testing.md says what runs where.
"""

import os
from collections.abc import Collection, Iterable

import pytest

ALL = os.environ.get("MOE_OPS_TESTS") == "all"
# A mark of tests, and of parameters.
in_full = pytest.mark.skipif(not ALL, reason="runs with MOE_OPS_TESTS=all, as in .ci/run")


def params(cases: Iterable, usual: Collection) -> list:
    """Parameters: the `usual` ones of the cases, and the others with MOE_OPS_TESTS=all."""
    cases = list(cases)
    unknown = [case for case in usual if case not in cases]
    assert not unknown, f"{unknown} are no cases"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in usual else in_full)
        for case in cases
    ]
