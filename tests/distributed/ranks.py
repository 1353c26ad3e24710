"""Runs cases on several processes that share a process group: started once for all cases of a world size.

Every rank runs every case, one after the other, and what each rank thought of it is gathered. A case that fails on some
rank leaves the others' collectives unfinished; the group is then made anew, so that the next case does not suffer.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# torch's watchdog gives all ranks four times so many milliseconds to write down what they ran, and ends the process.
DUMP_WAIT = 500
# Seconds: of the group, after which a collective without a partner fails (kernels compile meanwhile on a GPU), and of
# a whole run.
GROUP_TIMEOUT, RUN_TIMEOUT = {"gloo": 20, "nccl": 90}, 500


def run_processes(
    module: str, names: list[str], world_size: int, backend: str, env: dict[str, str] | None = None, folder: str = ""
) -> list[tuple[int | None, str, float]]:
    """Runs cases, one process a rank: (exit status, or None of one that was ended; what it printed; when it ended).

    Args:
        module: with a dict CASES of functions of a `Rank`.
        names: of the cases.
        world_size: processes.
        backend: of the group.
        env: of the processes, besides what they always have.
        folder: where they meet, and what they thought of each case is left.
    """
    if not folder:
        with tempfile.TemporaryDirectory() as made:
            return run_processes(module, names, world_size, backend, env, made)
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "GLOO_SOCKET_IFNAME": "lo", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": str(DUMP_WAIT), **(env or {}),
    }  # fmt: skip
    if backend == "nccl":  # whose runs stand side by side, each with a pool of compilers as large as the machine
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    command = [sys.executable, str(Path(__file__)), module, ",".join(names), folder, str(world_size), backend]
    logs = [open(f"{folder}/log{rank}", "w+") for rank in range(world_size)]  # noqa: SIM115
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    end, ended = time.monotonic() + RUN_TIMEOUT, {}
    try:
        while len(ended) < world_size and time.monotonic() < end:
            time.sleep(0.05)
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = process.returncode, time.time()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    results = []
    for rank, log in enumerate(logs):
        log.seek(0)
        code, when = ended.get(rank, (None, time.time()))
        results.append((code, log.read(), when))
        log.close()
    return results


def run_cases(module: str, names: list[str], world_size: int, backend: str = "gloo") -> dict[str, list[str]]:
    """What went wrong in each case: (empty: nothing) one text for each rank. Arguments as `run_processes`."""
    results: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, log, _) in enumerate(run_processes(module, names, world_size, backend, folder=folder)):
            print(f"rank {rank}:\n{log}")
            for name in names:
                file = Path(folder, f"{name}.{rank}")
                text = file.read_text() if file.exists() else f"rank {rank} did not get there:\n{log[-3000:]}"
                results.setdefault(name, []).append(text)
    return results


def results_once(
    factory, module: str, names: list[str], world_size: int, backend: str = "gloo"
) -> dict[str, list[str]]:
    """As `run_cases`, by whichever process of pytest-xdist asks first."""
    from tests.shared import made_once

    def make(folder: Path) -> None:
        results = run_cases(module, names, world_size, backend)
        Path(folder, "results.json").write_text(json.dumps(results))

    folder = made_once(factory, f"{module}-{backend}-{world_size}", make)
    return json.loads(Path(folder, "results.json").read_text())


class Rank:
    """One process of a run."""

    def __init__(self, rank: int, size: int, folder: str, backend: str) -> None:
        import torch.distributed as dist

        self.rank, self.size, self.folder, self.backend, self.round = rank, size, folder, backend, 0
        self.store = dist.FileStore(f"{folder}/store", size)
        self.connect()

    def connect(self) -> None:
        """Makes the default group."""
        import torch
        import torch.distributed as dist

        if self.backend == "nccl":
            torch.cuda.set_device(self.rank)
        self.round += 1
        dist.init_process_group(
            self.backend, store=dist.PrefixStore(f"round{self.round}", self.store), rank=self.rank,
            world_size=self.size, timeout=datetime.timedelta(seconds=GROUP_TIMEOUT[self.backend]),
        )  # fmt: skip

    @property
    def device(self) -> str:
        return f"cuda:{self.rank}" if self.backend == "nccl" else "cpu"

    def reconnect(self) -> None:
        """A new default group, after a case broke the old one."""
        import torch.distributed as dist

        dist.destroy_process_group()
        self.connect()

    def agreed(self, name: str, ok: bool) -> bool:
        """Whether a case went well everywhere; waits for all."""
        self.store.set(f"{name}/{self.rank}", json.dumps(ok))
        return all(json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.size))


def main(module: str, names: str, folder: str, world_size: str, backend: str, rank: str) -> None:
    """One process."""
    import importlib

    import torch.distributed as dist

    cases = importlib.import_module(module).CASES
    me = Rank(int(rank), int(world_size), folder, backend)
    for name in names.split(","):
        text, start = "", time.monotonic()
        try:
            cases[name](me)
        except BaseException:
            text = traceback.format_exc()
        print(f"{name}: {time.monotonic() - start:.2f} s", flush=True)
        Path(folder, f"{name}.{rank}").write_text(text)
        if not me.agreed(name, not text):
            me.reconnect()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
