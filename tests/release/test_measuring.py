"""benchmarks/release.sh: its steps, its limits, and that it goes on where it ended. Python only pretends here."""

import json
import multiprocessing
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from moe_ops.cli import make_parser
from moe_ops.cli.recorded import check_recorded, load_peers
from tests.checkout import ROOT
from tests.release import fake_jobs

SCRIPT = ROOT / "benchmarks" / "release.sh"
# Answers the look for a device, writes the file behind --json, and fails or hangs in the steps it is told to.
PRETENDER = """#!/bin/bash
echo "$*" >>"$CALLS"
if [[ $1 == -c ]]; then [[ $2 == *get_device_name* ]] && echo "${DEVICE:-h100 1}" || echo "a card"; exit 0; fi
while (($#)); do
    if [[ $1 == --json ]]; then file=$2; fi
    shift
done
[[ $file != *"-$FAILS.partial.json" ]] || { echo broken; exit 3; }
[[ $file != *"-$HANGS.partial.json" ]] || sleep 60
echo '{"cells": []}' >"$file"
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETENDER)
    python.chmod(0o755)

    def release(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "FAILS": "-", "HANGS": "-"}
        return subprocess.run(
            [str(SCRIPT), *arguments], env={**env, **variables}, capture_output=True, text=True, timeout=60
        )

    release.calls = tmp_path / "calls"
    release.out = tmp_path / "out"
    return release


def steps(run) -> list[tuple[str, int, list[str]]]:
    """(name, limit in seconds, command) of each step."""
    done = run("--dry-run")
    assert done.returncode == 0
    return [(name, int(limit), words) for name, limit, _, *words in map(str.split, done.stdout.splitlines())]


def test_steps_are_commands_that_can_be_parsed(run):
    found = steps(run)
    assert not run.calls.exists()
    assert {"whole-op-bf16", "fp8-block", "fp8-channel", "fp8-static", "int4", "mxfp4", "int8-weights", "skew-bf16",
            "eager-bf16", "host-cost", "topk-route", "tiles-bf16", "tiles-fp8-block", "tiles-fp8-channel", "end-to-end",
            "proof", "demo"} <= {name for name, _, _ in found}  # fmt: skip
    for name, limit, (_, *words) in found:
        assert 0 < limit <= 300, name
        assert words[words.index("--json") + 1].endswith(f"-{name}.json")
        if words[:2] == ["-m", "moe_ops"]:
            make_parser().parse_args(words[2:])
        else:
            text = "".join((ROOT / word).read_text() for word in words if word.endswith(".py"))
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), name


def test_a_run_and_the_next_one(run):
    done = run("--prefix", "now", str(run.out), FAILS="int4", DEVICE="h200 2")
    assert done.returncode == 1 and "int4: FAILED after" in done.stdout and "(3)" in done.stdout
    names = [name for name, _, _ in steps(run)]
    results = {file.name for file in run.out.glob("*.json")}
    assert {f"now-{name}.json" for name in names if name != "int4"} <= results and "now-int4.json" not in results
    with tarfile.open(run.out / "now.tar.gz") as tar:
        assert {"now-whole-op-bf16.json", "now-int4.log", "now-summary.txt"} <= set(tar.getnames())
    before = run.calls.read_text().count("--json")
    again = run("--prefix", "now", str(run.out), DEVICE="h200 2")
    assert again.returncode == 0 and again.stdout.count("done before") == 2 * (len(names) - 1)
    assert run.calls.read_text().count("--json") == before + 1


def test_the_first_step_compiles_what_the_others_launch(run, monkeypatch):
    """Those that are yet to run, each command as it will be."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ahead

    found = steps(run)
    assert found[0][0] == "compile" and found[0][2][-1].endswith("-compile.txt")
    timed = [(name, words) for name, _, (_, *words) in found if words[:3] == ahead.COMMAND]
    assert len(timed) > 10
    done = run("--prefix", "now", "--only", "compile,int4,whole-op-bf16,demo", str(run.out))
    calls = run.calls.read_text()
    assert done.returncode == 0 and calls.index("ahead.py") < calls.index("moe_ops bench")
    commands = (run.out / "now-compile.txt").read_text().splitlines()
    for command, name in zip(commands, ("whole-op-bf16", "int4"), strict=True):
        (words,) = (words for other, words in timed if other == name)
        expected = vars(make_parser().parse_args(words[2:]))
        assert vars(ahead.options_of(command)) == expected | {"json": "RESULT"}
    (run.out / "now-int4.json").unlink()
    assert run("--prefix", "now", "--only", "compile,int4,whole-op-bf16", str(run.out)).returncode == 0
    assert (run.out / "now-compile.txt").read_text().splitlines() == commands[1:]
    with pytest.raises(ValueError, match=r"'python benchmarks/proof.py' is no command of python -m moe_ops bench"):
        ahead.options_of("python benchmarks/proof.py")


def test_a_step_has_a_limit(run, tmp_path):
    """The limits are seconds: one is made short."""
    text = SCRIPT.read_text()
    assert "step host-cost 30 " in text
    copy = tmp_path / "benchmarks" / "release.sh"
    copy.parent.mkdir()
    copy.write_text(text.replace("step host-cost 30 ", "step host-cost 1 "))
    env = {
        **os.environ,
        "PYTHON": str(tmp_path / "python"),
        "CALLS": str(run.calls),
        "FAILS": "-",
        "HANGS": "host-cost",
    }
    done = subprocess.run(
        ["bash", str(copy), "--only", "host-cost", str(run.out)], env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "host-cost: FAILED" in done.stdout and "its limit of 1 s" in done.stdout


def test_device_names_the_files(run):
    done = run("--only", "demo,proof", str(run.out))
    assert done.returncode == 0
    names = {file.name for file in run.out.glob("*.json")}
    assert len(names) == 2 and all(re.fullmatch(r"\d{4}-\d\d-\d\d-h100-(demo|proof)\.json", name) for name in names)


def test_without_a_gpu(run):
    done = run(str(run.out), DEVICE="cpu 0")
    assert done.returncode == 2 and "--dry-run and --quick go without" in done.stderr
    done = run("--quick", str(run.out), DEVICE="cpu 0")
    assert done.returncode == 0 and "whole-op-bf16: left out: it needs 1 GPU(s), and torch sees 0" in done.stdout
    made = {file.name.split("-cpu-")[1] for file in run.out.glob("*.json")}
    assert {"host-cost.json", "proof.json", "demo.json"} <= made and "whole-op-bf16.json" not in made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "--fast is not known"),
        (["--only"], "--only needs a value"),
        (["--minutes", "soon"], "--minutes is 'soon', expected a number above 0"),
        (["--dry-run", "--only", "lunch"], "--only lunch: there is no such step; there are compile whole-op-bf16"),
        (["--dry-run", "a", "b"], "one folder at most, got a and b"),
    ],
)
def test_wrong_arguments(run, arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr


def test_peers_are_of_the_format_that_is_measured(run):
    """A step beside recorded peers would end before it begins if they were of another one."""
    beside = 0
    for name, _, words in steps(run):
        if "--recorded" in words:
            file = words[words.index("--recorded") + 1]
            form = words[words.index("--format") + 1] if "--format" in words else "none"
            check_recorded(load_peers(ROOT / file), name, "bfloat16", form)
            beside += 1
    assert beside == 3


def test_files_of_a_demo_are_named_from_the_root(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import demo

    example, file = tmp_path / "example.py", tmp_path / "demo.json"
    example.write_text(f"print('weights: {ROOT}/.cache/one')")
    monkeypatch.setattr("sys.argv", ["demo.py", "--json", str(file), str(example)])
    assert demo.main() == 0 and str(ROOT) in capsys.readouterr().out
    assert json.loads(file.read_text())["printed"] == ["weights: .cache/one"]


def test_results_are_whole():
    """Every recorded file says on what, with what and when, and names no folder of the machine."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        text = file.read_text()
        assert str(ROOT) not in text and "/home/" not in text, file.name
        record = json.loads(text)
        facts = record.get("environment", record)
        assert {"torch", "date"} <= set(facts), file.name
        assert re.match(r"\d{4}-\d\d-\d\d", facts["date"]) and (facts.get("device") or facts.get("cpu")), file.name


@pytest.fixture
def in_turn(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import in_turn

    return in_turn


def test_jobs_get_ready_together_and_take_turns(in_turn, tmp_path):
    log = str(tmp_path / "log")
    jobs = [(log, name) for name in "abc"]
    results = dict(in_turn.run_in_turn(fake_jobs.work, jobs, 2))
    assert [results[job][0] for job in jobs] == ["a", "b", "c"]
    assert len({os.getpid(), *(pid for _, pid in results.values())}) == 4
    said = Path(log).read_text().split("\n")[:-1]
    assert sorted(said[:2]) == ["a ready", "b ready"]
    assert said[2:6] == ["a begins", "a ends", "b begins", "b ends"] and said[6:] == ["c ready", "c begins", "c ends"]
    # One at a time they need no processes.
    assert [result for _, result in in_turn.run_in_turn(fake_jobs.work, jobs, 1)] == [(n, os.getpid()) for n in "abc"]


@pytest.mark.parametrize(("name", "when"), [("fails", "ready"), ("ends", "done")])
def test_a_job_that_fails_ends_the_others(in_turn, capfd, tmp_path, name, when):
    log = str(tmp_path / "log")
    with pytest.raises(in_turn.JobError, match=f"'{name}'.* failed before it was {when}"):
        list(in_turn.run_in_turn(fake_jobs.work, [(log, name), (log, "b")], 2))
    assert not multiprocessing.active_children()
    assert ("as it should" in capfd.readouterr().err) == (name == "fails")
    assert "b begins" not in Path(log).read_text()


def test_what_pytest_says_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import proof

    said = "...\n= short =\nFAILED x\n1 failed, 12 passed, 3 skipped, 2 errors in 1.2s\n"
    assert proof.counts(said) == {"failed": 1, "passed": 12, "skipped": 3, "error": 2}
    assert proof.counts("nothing") == {}
    assert all((ROOT / file).exists() for files in proof.FILES.values() for file in files)


def test_python_folder_is_not_shadowed():
    """Scripts of benchmarks/ import their neighbours by name: none has that of a package that they need."""
    taken = {"torch", "triton", "json", "moe_ops", "pytest", "matplotlib", "tables", "statistics"}
    assert not {file.stem for file in Path(ROOT / "benchmarks").glob("*.py")} & taken
