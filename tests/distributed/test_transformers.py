"""transformers' expert parallelism with gloo on 2 processes, by its own implementations and by that of the op."""

import functools

import pytest

from tests.amount import in_full
from tests.distributed.ranks import run_cases

pytest.importorskip("transformers.distributed.expert_parallel")

NAMES = ("sentinel_ids", "own_batches", "shared_batch", "unknown_experts")


@functools.cache
def results():
    return run_cases("tests.distributed.hf_cases", list(NAMES), 2)


@pytest.mark.xdist_group("gloo")
@in_full
@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    for rank, text in enumerate(results()[name]):
        assert not text, f"rank {rank}:\n{text}"
