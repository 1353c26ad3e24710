"""transformers' expert parallelism with gloo on 2 processes, by its own implementations and by that of the op."""

import pytest

from tests.amount import in_full
from tests.distributed.ranks import results_once

pytest.importorskip("transformers.distributed.expert_parallel")

NAMES = ("sentinel_ids", "own_batches", "shared_batch", "unknown_experts")


@in_full
@pytest.mark.parametrize("name", NAMES)
def test_case(name, tmp_path_factory):
    results = results_once(tmp_path_factory, "tests.distributed.hf_cases", list(NAMES), 2)
    for rank, text in enumerate(results[name]):
        assert not text, f"rank {rank}:\n{text}"
