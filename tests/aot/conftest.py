"""A kernel is compiled once a run, whichever process needs it."""

import pytest

from tests.aot import harness
from tests.shared import run_folder


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    harness.cache = run_folder(tmp_path_factory) / "kernels"
    harness.cache.mkdir(exist_ok=True)
