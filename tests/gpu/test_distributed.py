"""Expert parallelism with NCCL, a process for each GPU: the cases of tests/distributed, in several runs at once."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.fault_cases import DEATH_TIMEOUT, RAISED, RETURNED
from tests.distributed.ranks import run_cases, run_processes
from tests.shared import made_once

# Each run has two processes of its own: its kernels take far longer to compile than to run.
RUNS = (
    ("ways", "no_tokens", "placements", "capacity", "capacity_on_one_rank", "disagreements"),
    ("hostile_ids", "routings", "exact", "repeated", "layers"),
    ("formats",),
    ("halved_partial_sums", "rounded_partial_sums"),
    ("graphs", "compiled_layer"),
    ("compiled",),
    ("qwen3_30b",),
    ("qwen3_30b_fp8",),
    ("deepseek_v3",),
    ("deepseek_v3_fp8",),
)
MODULE = "tests.distributed.cases"
# torch's watchdog gives all ranks four times so many milliseconds to write down what they ran, and ends the process.
DUMP_WAIT = 1000
# Seconds more than the group's timeout in which the process has ended, beside other runs' compilers.
GRACE = 25

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]


def run_all(folder):
    """Every run, and a rank that dies: once with torch's watchdog, once with waits that block."""
    with ThreadPoolExecutor(len(RUNS) + 2) as pool:
        env = {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": str(DUMP_WAIT)}
        dying = {
            blocking: pool.submit(
                run_processes, MODULE, ["dead_rank_nccl"], 2, "nccl", env | {"TORCH_NCCL_BLOCKING_WAIT": blocking}
            )
            for blocking in ("0", "1")
        }
        running = [pool.submit(run_cases, MODULE, list(names), 2, "nccl") for names in RUNS]
        results = {name: texts for run in running for name, texts in run.result().items()}
        dead = {blocking: run.result()[1] for blocking, run in dying.items()}
    Path(folder, "results.json").write_text(json.dumps({"cases": results, "dead": dead}))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = made_once(tmp_path_factory, "nccl", run_all)
    return json.loads(Path(folder, "results.json").read_text())


@pytest.mark.parametrize("name", [name for names in RUNS for name in names])
def test_case(name, results):
    for rank, text in enumerate(results["cases"][name]):
        assert not text, f"rank {rank}:\n{text}"


@pytest.mark.parametrize(
    ("blocking", "message"),
    [
        ("0", r"Watchdog caught collective operation timeout: WorkNCCL\(.*OpType=ALLTOALL"),
        (
            "1",
            r"RuntimeError: the all-to-all of the sizes failed on rank 1 of 2: .*OpType=ALLTOALL.*; a rank .* has died",
        ),
    ],
)
def test_dead_rank(blocking, message, results):
    """The other ends within the group's timeout, and says at what."""
    code, log, ended = results["dead"][blocking]
    begun = re.search(r"the last call begins ([\d.]+)", log)
    ended_by_itself = code == RAISED if blocking == "1" else code not in (None, 0, RAISED, RETURNED)
    assert begun and ended_by_itself and re.search(message, log), (code, log[-3000:])
    assert DEATH_TIMEOUT - 1 < ended - float(begun[1]) < DEATH_TIMEOUT + GRACE
