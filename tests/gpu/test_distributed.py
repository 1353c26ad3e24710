"""Expert parallelism with NCCL, a process for each GPU: the cases of tests/distributed, and CUDA graphs."""

import pytest
import torch

from tests.distributed.ranks import results_once

NAMES = ("ways", "hostile_ids", "no_tokens", "routings", "placements", "exact", "repeated", "formats", "capacity",
         "capacity_on_one_rank", "rounded_partial_sums", "layers", "disagreements", "graphs",
         "compiled_layer")  # fmt: skip

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]


@pytest.mark.parametrize("name", NAMES)
def test_case(name, tmp_path_factory):
    results = results_once(tmp_path_factory, "tests.distributed.cases", list(NAMES), 2, "nccl")
    for rank, text in enumerate(results[name]):
        assert not text, f"rank {rank}:\n{text}"
