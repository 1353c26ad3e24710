"""Expert parallelism with NCCL, a process for each GPU: the cases of tests/distributed, and CUDA graphs."""

import functools

import pytest
import torch

from tests.distributed.ranks import run_cases

NAMES = ("ways", "hostile_ids", "no_tokens", "routings", "placements", "exact", "repeated", "formats", "capacity",
         "capacity_on_one_rank", "rounded_partial_sums", "layers", "disagreements", "graphs",
         "compiled_layer")  # fmt: skip

pytestmark = [
    pytest.mark.xdist_group("nccl"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]


@functools.cache
def results():
    return run_cases("tests.distributed.cases", list(NAMES), 2, "nccl")


@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    for rank, text in enumerate(results()[name]):
        assert not text, f"rank {rank}:\n{text}"
