"""`python -m moe_ops env | doctor`, without a GPU."""

import json

import pytest
import torch

from moe_ops.cli import doctor, env
from moe_ops.cli.known import known_card
from tests.command import output_of

pytestmark = pytest.mark.usefixtures("without_a_gpu")


def test_env(capsys):
    record = json.loads(output_of(capsys, "env", "--json"))
    assert record["versions"]["torch"] == torch.__version__ and record["device"]["name"] == "cpu"
    assert record["paths"]["cpu"] is None and "move them to a CUDA device" in record["paths"]["classic"]
    text = output_of(capsys, "env")
    assert "versions" in text and "paths and kernels" in text


def test_env_says_why_paths_are_not_there():
    from moe_ops.cli.env import paths

    on = {name: paths(known_card(name).device) for name in ("a100", "h200", "b200")}
    kernels = ("tma", "tma, pingpong", "tma, blockscaled", "tma, packed", "tma, mixed")
    assert not any(on["h200"][path] for path in kernels)
    assert "TMA needs 9.0" in on["a100"]["tma"] and on["a100"]["classic"] is None
    assert on["b200"]["tma"] is None and "wgmma is 9.x alone" in on["b200"]["tma, pingpong"]


def test_doctor_finds_nothing_broken(capsys):
    findings = json.loads(output_of(capsys, "doctor", "--json"))
    states = {finding["check"]: finding["state"] for finding in findings}
    assert states["torch"] == states["small call, cpu"] == states["settings"] == "ok"
    assert "what to do" in output_of(capsys, "doctor")


def break_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "perhaps")


def break_config_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path / "nowhere"))


def break_table(monkeypatch, tmp_path):
    (tmp_path / "sm_90").mkdir()
    (tmp_path / "sm_90" / "E=1,H=1.json").write_text("{")
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path))


def break_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")


def break_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "triton_facts", lambda: ("3.1.0", False))


def break_cache(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton").knobs
    (tmp_path / "file").touch()
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file" / "cache"))


def break_driver(monkeypatch, tmp_path):
    (tmp_path / "version").touch()
    monkeypatch.setattr(doctor, "DRIVER_FILE", tmp_path / "version")


def test_driver_version(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "DRIVER_FILE", tmp_path / "version")
    assert env.driver_version() is None
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    (tmp_path / "version").write_text(line)
    assert env.driver_version() == "580.95.05"


def break_the_op(monkeypatch, tmp_path):
    import moe_ops

    monkeypatch.setattr(moe_ops, "fused_moe", lambda x, *_, **__: x)


BREAKS = {
    "settings": (break_settings, "MOE_OPS_BATCH_INVARIANT is 'perhaps'"),
    "config-dir": (break_config_dir, "unset MOE_OPS_CONFIG_DIR"),
    "table": (break_table, "E=1,H=1.json"),
    "torch": (break_torch, "install torch>=2.11"),
    "triton": (break_triton, "install triton>=3.6"),
    "cache": (break_cache, "TRITON_CACHE_DIR"),
    "driver": (break_driver, "an NVIDIA driver is loaded"),
    "op": (break_the_op, "wrong result"),
}


@pytest.mark.parametrize(("breaks", "words"), BREAKS.values(), ids=BREAKS)
def test_doctor_finds_what_is_broken(capsys, monkeypatch, tmp_path, breaks, words):
    breaks(monkeypatch, tmp_path)
    findings = json.loads(output_of(capsys, "doctor", "--json", status=1))
    broken = [finding for finding in findings if finding["state"] == "broken"]
    # What the environment breaks, the small call meets too.
    assert len(broken) == (2 if breaks is break_settings else 1)
    assert words in str(broken[0]) and broken[0]["cure"]
