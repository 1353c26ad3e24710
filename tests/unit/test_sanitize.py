"""scripts/sanitize.py without a GPU: what it reads, keeps and starts, with a shell script as compute-sanitizer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import moe_ops
from tests.gpu.repeats import ALL_CASES

ROOT = Path(moe_ops.__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("sanitize", ROOT / "scripts" / "sanitize.py")
sanitize = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sanitize)

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CLEAN, (0, 0)),
        ("========= ERROR SUMMARY: 1 error\n", (1, 0)),
        ("torch's own words\n========= ERROR SUMMARY: 1234 errors\n", (1234, 0)),
        ("========= ERROR SUMMARY: 5 errors\n========= ERROR SUMMARY: 7 errors\n", (7, 0)),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", (0, 0)),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", (1, 0)),
        (RACES, (2, 1)),
        ("========= LEAK SUMMARY: 0 bytes leaked in 0 allocations\n", None),
        ("the child prints ERROR SUMMARY: 0 errors\n", None),
        ("========= Error: Target application terminated before first instrumented API call\n", None),
        ("", None),
    ],
)
def test_parse_summary(output, expected):
    assert sanitize.parse_summary(output) == expected


@pytest.mark.parametrize(
    ("tool", "variant", "output", "status", "verdict"),
    [
        ("memcheck", "direct", CLEAN, 0, "ok"),
        ("memcheck", "direct", CLEAN, 1, "failed"),
        ("memcheck", "direct", CLEAN, None, "timeout"),
        ("memcheck", "direct", "", 0, "no summary"),
        ("racecheck", "direct", RACES, 0, "errors"),
        ("racecheck", "direct", "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 0, "ok"),
        ("plain", "direct", "", 0, "ok"),
        ("plain", "direct", "", 1, "failed"),
        ("memcheck", "planted", "========= ERROR SUMMARY: 9 errors\n", 1, "ok"),
        ("memcheck", "planted", CLEAN, 0, "blind"),
        ("memcheck", "planted", "", 1, "no summary"),
    ],
)
def test_judge(tool, variant, output, status, verdict):
    assert sanitize.judge(tool, variant, output, status, 1.0).verdict == verdict


def test_read_version():
    assert sanitize.read_version("NVIDIA (R)\nVersion 2025.3.1.0 (build 36400806) (public-release)\n") == (
        2025,
        3,
        1,
        0,
    )
    assert sanitize.read_version("2025") == () < sanitize.FIRST_RACECHECK


def test_plan():
    assert sanitize.plan(["memcheck", "racecheck"], ["planted", "direct"]) == [
        ("memcheck", "planted"),
        ("plain", "direct"),
        ("memcheck", "direct"),
        ("racecheck", "direct"),
    ]


def test_command():
    child = [sys.executable, str(ROOT / "scripts" / "sanitize.py"), "--child", "direct"]
    assert sanitize.command_of("cs", "plain", "direct", "x", ["--y"]) == child
    plain = sanitize.command_of("cs", "memcheck", "direct", None, [])
    assert plain[:3] == ["cs", "--tool", "memcheck"] and plain[-4:] == child
    assert "--padding" in plain and "--kernel-name" not in plain
    command = sanitize.command_of("cs", "racecheck", "direct", "_kernel$", ["--print-limit=7"])
    assert "--padding" not in command
    assert command[-7:] == ["--kernel-name", "regex=_kernel$", "--print-limit=7", *child]


def test_results_are_kept(tmp_path):
    file = tmp_path / "results.json"
    clean, slow = sanitize.Result("ok", 0, 0, 1.5), sanitize.Result("timeout", None, 0, 600.0)
    results = sanitize.Results(file, "state")
    results.add("memcheck", "direct", clean)
    results.add("racecheck", "direct", slow)
    again = sanitize.Results(file, "state")
    assert again.get("memcheck", "direct") == clean
    assert again.get("racecheck", "direct") is None
    assert again.get("memcheck", "pingpong") is None
    assert sanitize.Results(file, "other code").get("memcheck", "direct") is None
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"state": "s"}', '{"state": "s", "results": {"a b": {"x": 1}}}']
)
def test_a_broken_file_is_no_results(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    results = sanitize.Results(file, "s")
    results.add("memcheck", "direct", sanitize.Result("ok", 0, 0, 1.0))
    assert json.loads(file.read_text())["results"]["memcheck direct"]["errors"] == 0


def test_state_follows_settings():
    assert sanitize.state_of((1,), None, []) == sanitize.state_of((1,), None, [])
    assert sanitize.state_of((1,), None, []) != sanitize.state_of((2,), None, [])


def test_output_and_timeout_of_a_run(tmp_path):
    log = tmp_path / "log"
    assert sanitize.run(["sh", "-c", "echo a; echo b >&2; exit 3"], log, 60)[0] == 3
    assert log.read_text() == "a\nb\n"
    # What the command has started ends with it, though it holds on to the log.
    status, seconds = sanitize.run(["sh", "-c", "echo $PYTORCH_NO_CUDA_MEMORY_CACHING; sleep 60 & sleep 60"], log, 0.5)
    assert status is None and seconds < 30
    assert log.read_text() == "1\n"


@pytest.mark.parametrize(
    "arguments",
    [["--tool", "leakcheck"], ["--variant", "sorted"], ["--child", "nothing"], ["--timeout", "soon"]],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        sanitize.main(arguments)
    assert error.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_no_sanitizer(capsys, tmp_path):
    assert sanitize.main(["--sanitizer", str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert "none was not found" in message and message.count("\n") == 1


# Answers as the tools do: clean but for one variant, and with errors for the planted one.
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2026.4.0.0 (build 1)"; exit; fi
echo "$2 $*" >> {calls}
case "$*" in
*planted) echo "========= ERROR SUMMARY: 12 errors";;
*racecheck*{broken}) echo "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)";;
*racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Runs main with a fake tool and GPU, children that do nothing; gives (exit status, calls of the tool)."""
    calls, tool = tmp_path / "calls", tmp_path / "compute-sanitizer"
    command_of = sanitize.command_of
    monkeypatch.setattr(sanitize, "check_gpu", lambda: None)
    monkeypatch.setattr(
        sanitize, "command_of", lambda *args: ["true"] if args[1] == sanitize.PLAIN else command_of(*args)
    )

    def main(*arguments, broken="nothing"):
        calls.write_text("")
        tool.write_text(FAKE.format(calls=calls, broken=broken))
        tool.chmod(0o755)
        status = sanitize.main(["--sanitizer", str(tool), "--log", str(tmp_path / "log"), *arguments])
        return status, [line.split()[0] + " " + line.split()[-1] for line in calls.read_text().splitlines()]

    return main


def test_all_clean_and_done_once(machine, capsys):
    status, calls = machine()
    expected = ["memcheck planted", *(f"{tool} {name}" for name in ALL_CASES for tool in ("memcheck", "racecheck"))]
    assert (status, calls) == (0, expected)
    lines = capsys.readouterr().out.splitlines()[-2 - 3 * len(ALL_CASES) :]
    assert lines[0].split() == ["tool", "variant", "errors", "warnings", "seconds", "verdict"]
    assert lines[1].split()[:4] == ["memcheck", "planted", "12", "0"]
    assert machine() == (0, [])
    assert machine("--variant", "direct", "--tool", "synccheck") == (0, ["synccheck direct"])
    assert machine("--variant", "direct", "--again") == (0, ["memcheck direct", "racecheck direct"])


def test_errors(machine, capsys):
    pair = ("--variant", "pingpong", "direct")
    assert machine(*pair, broken="pingpong") == (1, ["memcheck pingpong", "racecheck pingpong"])
    assert "racecheck pingpong: errors, see" in capsys.readouterr().out
    # An error is a result too: it is not run again, and stays one.
    assert machine(*pair, broken="pingpong") == (1, [])
    assert machine(*pair, "--keep-going") == (1, ["memcheck direct", "racecheck direct"])
    assert machine(*pair, "--again")[0] == 0


def test_no_gpu(machine, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine()[0] == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
