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
# Seconds: of the group, after which a collective without a partner fails (kernels compile meanwhile on a GPU), and of
# a whole run.
GROUP_TIMEOUT, RUN_TIMEOUT = {"gloo": 20, "nccl": 90}, 500


def run_cases(module: str, names: list[str], world_size: int, backend: str = "gloo") -> dict[str, list[str]]:
    """What went wrong in each case: (empty: nothing) one text for each rank.

    Args:
        module: with a dict CASES of functions of a `Rank`.
        names: of the cases.
        world_size: processes.
        backend: of the group.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__)), module, ",".join(names), folder, str(world_size), backend]
        logs = [open(f"{folder}/log{rank}", "w+") for rank in range(world_size)]  # noqa: SIM115
        processes = [
            subprocess.Popen([*command, str(rank)], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + RUN_TIMEOUT
        try:
            for process in processes:
                process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        results = {}
        for rank, log in enumerate(logs):
            log.seek(0)
            tail = log.read()[-3000:]
            log.close()
            for name in names:
                file = Path(folder, f"{name}.{rank}")
                text = file.read_text() if file.exists() else f"rank {rank} did not get there:\n{tail}"
                results.setdefault(name, []).append(text)
        return results


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
