"""A worker of the tuner without a device: it crashes, hangs and takes its time as a file of settings says.

It imports nothing of the package, and so no torch, which would take each of many processes two seconds.
"""

import json
import os
import time
from pathlib import Path

DEVICE = {
    "kind": "cuda", "name": "Fake GPU", "capability": [9, 0], "num_sms": 132, "shared_memory": 227 * 1024,
    "triton": "3.9.0", "has_descriptors": True, "interpreted": False,
}  # fmt: skip


def matches(rule: dict, candidate: dict, part: str | None) -> bool:
    """Whether a candidate, or a part of it, is what a rule is about: {"up.num_stages": 5}."""
    keys = {tuple(path.split(".")): value for path, value in rule.items()}
    return all(part in (None, which) and candidate[which][name] == value for (which, name), value in keys.items())


def milliseconds(candidate: dict) -> float:
    """Swapped operands are faster, more stages of the up GEMM up to four, and large groups of the down GEMM."""
    up, down = candidate["up"], candidate["down"]
    return 1.0 - 0.3 * up["swap_ab"] - 0.1 * min(up["num_stages"], 4) - 0.05 * (down["group_m"] >= 32)


def main(connection, log: str, device: dict | None = None) -> None:
    settings = json.loads(Path(log).read_text())
    if settings.get("no_start"):
        os._exit(7)

    def send(**event) -> None:
        connection.send_bytes(json.dumps(event).encode())

    send(event="ready", device=DEVICE, versions={"moe_ops": "0", "torch": "1", "triton": "2"}, memory=80 << 30)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        with open(f"{log}.requests", "a") as stream:
            stream.write(json.dumps(request) + "\n")
        time.sleep(settings.get("sleep", 0))
        failed = None
        for index, candidate in enumerate(request["candidates"]):
            send(event="begin", index=index)
            for what in ("crash", "hang", "fail", "wrong"):
                if any(matches(rule, candidate, request.get("part")) for rule in settings.get(what, ())):
                    if what == "crash":
                        os._exit(3)
                    if what == "hang":
                        time.sleep(3600)
                    if what == "fail" or request["op"] == "verify":
                        failed = f"RuntimeError: {what}"
        if failed:
            send(event="failed", error=failed, broken=False)
        elif request["op"] == "race":
            send(event="done", result=[milliseconds(candidate) for candidate in request["candidates"]])
        else:
            send(event="done", result={})
