"""Expert parallelism with NCCL, a process for each of two or four GPUs: the cases of tests/distributed."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.fault_cases import FAULT_TIMEOUT, LATE, RAISED, RETURNED
from tests.distributed.ranks import run_cases, run_processes
from tests.shared import made_once

# Each run has processes of its own: kernels take far longer to compile than to run. DeepSeek-V3's weights in both
# formats, beside all the contexts, would not fit in 80 GB.
RUNS = (
    ("ways", "no_tokens", "placements", "capacity", "capacity_on_one_rank", "disagreements"),
    ("hostile_ids", "routings", "exact", "repeated", "layers"),
    ("formats",),
    ("halved_partial_sums", "rounded_partial_sums"),
    ("graphs", "compiled_layer"),
    ("compiled",),
    ("qwen3_30b",),
    ("qwen3_30b_fp8",),
    ("deepseek_v3", "deepseek_v3_fp8"),
)
MODULE = "tests.distributed.cases"
RANKS = 4 if torch.cuda.device_count() >= 4 else 2
# Seconds more than the group's timeout in which the process has ended, beside other runs' compilers.
GRACE = 25

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]


def run_all(folder):
    """Every run, and a rank that dies or sleeps: once with torch's watchdog, once with waits that block."""
    with ThreadPoolExecutor(len(RUNS) + 4) as pool:
        faults = {
            f"{case} {blocking}": pool.submit(
                run_processes, MODULE, [f"{case}_nccl"], 2, "nccl", {"TORCH_NCCL_BLOCKING_WAIT": blocking}
            )
            for case in ("dead_rank", "slow_rank")
            for blocking in ("0", "1")
        }
        running = [pool.submit(run_cases, MODULE, list(names), RANKS, "nccl") for names in RUNS]
        results = {name: texts for run in running for name, texts in run.result().items()}
        ends = {name: run.result() for name, run in faults.items()}
    Path(folder, "results.json").write_text(json.dumps({"cases": results, "faults": ends}))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = made_once(tmp_path_factory, "nccl", run_all)
    return json.loads(Path(folder, "results.json").read_text())


@pytest.mark.parametrize("name", [name for names in RUNS for name in names])
def test_case(name, results):
    for rank, text in enumerate(results["cases"][name]):
        assert not text, f"rank {rank}:\n{text}"


# Of a process that torch's watchdog ends.
ABORTED = -signal.SIGABRT
# What a rank says that waits for another: with torch's watchdog, and where the host waits.
SAID = [
    ("0", r"Watchdog caught collective operation timeout: WorkNCCL\(.*OpType=ALLTOALL"),
    ("1", r"RuntimeError: the all-to-all of the sizes failed on rank 1 of 2: .*OpType=ALLTOALL.*; a rank .* has died"),
]


def lasted(log, when):
    """Seconds from the begin of the last call to the end of the process."""
    begun = re.search(r"the last call begins ([\d.]+)", log)
    assert begun, log[-3000:]
    return when - float(begun[1])


@pytest.mark.parametrize(("blocking", "message"), SAID)
@pytest.mark.parametrize("case", ["dead_rank", "slow_rank"])
def test_waiting_rank(case, blocking, message, results):
    """The other ends within the group's timeout, and says at what, whether a rank has died or sleeps."""
    code, log, when = results["faults"][f"{case} {blocking}"][1]
    assert code == (RAISED if blocking == "1" else ABORTED), (code, log[-3000:])
    assert re.search(message, log), log[-3000:]
    assert FAULT_TIMEOUT - 1 < lasted(log, when) < FAULT_TIMEOUT + GRACE


@pytest.mark.parametrize("blocking", ["0", "1"])
def test_slow_rank(blocking, results):
    """One that comes too late waits no longer than the others did, and has an error or the right result.

    The latter where torch's watchdog has not ended the other yet, whose kernels are still there to answer.
    """
    code, log, when = results["faults"][f"slow_rank {blocking}"][0]
    assert code in ((RAISED,) if blocking == "1" else (ABORTED, RETURNED)), (code, log[-3000:])
    assert lasted(log, when) < LATE + FAULT_TIMEOUT + GRACE
