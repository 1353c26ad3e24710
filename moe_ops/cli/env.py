"""`python -m moe_ops env`: versions, the device, and which paths are available or why not."""

import argparse
import importlib.metadata
import json
import platform
import re
from pathlib import Path

import torch

import moe_ops
from moe_ops import env
from moe_ops.cli.options import HelpFormatter
from moe_ops.cli.output import show_table
from moe_ops.cli.problems import describe_call
from moe_ops.devices import Device, describe, triton_facts
from moe_ops.dispatch import tma_obstacle, triton_obstacle
from moe_ops.tuning import variant_obstacle
from moe_ops.tuning.lookup import folders

_PACKAGES = ("transformers", "matplotlib", "rich", "tqdm")
_SIZES = (8, 2, 4096, 14336)
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "env",
        help="print versions, the device, and which paths are available and why not",
        description="Prints what a bug report needs: versions, the device, which paths and kernels can run a bf16 call "
        "there and why the others cannot, the MOE_OPS_* variables, and the tables of tuned tiles that were found.",
        epilog="examples:\n  python -m moe_ops env\n  python -m moe_ops env --json",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    record = {"versions": versions(), "device": _device(), "paths": paths(_current()), "settings": _settings()}
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    for title in ("versions", "device", "settings"):
        show_table(title, ("what", "value"), list(record[title].items()))
    rows = [(name, "no" if reason else "yes", reason) for name, reason in record["paths"].items()]
    show_table("paths and kernels, for a bf16 call", ("name", "runs", "why not"), rows)
    return 0


def versions() -> dict[str, str | None]:
    """Of everything that matters to a result; None for what is not installed."""
    found = {
        "moe_ops": moe_ops.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "triton": triton_facts()[0],
        "cuda of torch": torch.version.cuda,
        "driver": driver_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def driver_version() -> str | None:
    """The release of the NVIDIA driver, as "580.95"; None where none is loaded."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found and found[0]


def _current() -> Device:
    if torch.cuda.is_available():
        return describe(torch.device("cuda", torch.cuda.current_device()))
    return describe(torch.device("cpu"))


def _device() -> dict[str, object]:
    device = _current()
    facts: dict[str, object] = {"name": device.name}
    if device.kind == "cuda":
        facts |= {
            "compute capability": device.capability and "{}.{}".format(*device.capability),
            "multiprocessors": device.num_sms,
            "shared memory of a program": device.shared_memory,
            "memory": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
            "devices": torch.cuda.device_count(),
        }
    return facts | {"interpreted": device.interpreted}


def paths(device: Device) -> dict[str, str | None]:
    """Why each path and kernel variant cannot run a bf16 call (or one of its formats) there; None where it can."""
    from moe_ops.cli.formats import FORMATS

    problem = describe_call(_SIZES, 4096, torch.bfloat16)
    no_tma = tma_obstacle(problem, device)
    found = {
        "cpu": None if device.kind == "cpu" else "the tensors of this device are on the GPU",
        "reference": None,
        "classic": triton_obstacle(device),
        "tma": no_tma,
    }
    for variant, form in (
        ("pingpong", None), ("blockscaled", "fp8_block"), ("packed", "int4"), ("mixed", "int8_weights")
    ):  # fmt: skip
        call = problem if form is None else describe_call(_SIZES, 4096, torch.bfloat16, FORMATS[form])
        found[f"tma, {variant}"] = no_tma or variant_obstacle(variant, call, device, "tma")
    return found


def _settings() -> dict[str, object]:
    device = _current()
    try:
        invariant: object = env.batch_invariant()
    except ValueError as error:
        invariant = str(error)
    facts: dict[str, object] = {
        "MOE_OPS_BATCH_INVARIANT": invariant,
        "MOE_OPS_CONFIG_DIR": env.config_dir(),
        "log level of moe_ops": env.LOGGER.getEffectiveLevel(),
    }
    if device.kind == "cuda":
        for folder in folders(device.name, device.capability, env.config_dir()):
            facts[f"tables in {folder}"] = len(list(folder.glob("*.json"))) if folder.is_dir() else "no folder"
    return facts
