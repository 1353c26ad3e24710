"""Expert parallelism with gloo on the CPU: 2 and 4 processes, started once for all cases of each (`ranks.py`)."""

import pytest
import torch.distributed as dist

from tests.amount import ALL, in_full
from tests.distributed.ranks import results_once

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

EVERYWHERE = ("ways", "no_tokens", "placements", "capacity_on_one_rank", "meshes", "disagreements")
ON_TWO = ("hostile_ids", "routings", "options", "exact", "repeated", "formats", "payload_bytes", "rounded_partial_sums",
          "halved_partial_sums", "capacity", "layers", "traced", "wrong_on_one_rank", "slow_rank")  # fmt: skip
IN_FULL = {2: ("all_formats", "compiled", "compiled_layer", "beside_fsdp"), 4: (*ON_TWO, "beside_fsdp")}
# Ends its run.
LAST = ("dead_rank",)


def names(size):
    usual = EVERYWHERE + (ON_TWO if size == 2 else ())
    return usual + (IN_FULL[size] if ALL else ()) + LAST


@pytest.mark.parametrize(
    ("size", "name"),
    [(2, n) for n in EVERYWHERE + ON_TWO + LAST]
    + [(4, n) for n in EVERYWHERE + LAST]
    + [pytest.param(size, n, marks=in_full) for size, more in IN_FULL.items() for n in more],
)
def test_case(size, name, tmp_path_factory):
    results = results_once(tmp_path_factory, "tests.distributed.cases", list(names(size)), size)
    for rank, text in enumerate(results[name]):
        assert not text, f"rank {rank} of {size}:\n{text}"
