"""`python -m moe_ops tune` without a GPU: candidates, the command with fake workers, what a kill leaves."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops.cli import main, plots, tune
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import CARDS, known_card
from moe_ops.cli.tuner import compiler
from moe_ops.cli.tuner.calls import Call, tiles_from_json
from moe_ops.cli.tuner.candidates import first_wave, second_wave
from moe_ops.dispatch import choose_path
from moe_ops.tuning import lookup
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import load_table
from tests.amount import ALL
from tests.unit import fake_worker
from tests.unit.test_cli import error_of, output_of
from tests.unit.test_house import ROOT
from tests.unit.test_tuner_search import CALL, H200

# Candidates.


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(CARDS)), st.sampled_from(["none", *FORMATS]), st.integers(1, 1 << 15),
    st.sampled_from([(8, 2, 4096, 14336), (128, 8, 2048, 768), (256, 8, 7168, 256), (32, 4, 2880, 2880)]),
)  # fmt: skip
def test_candidates_fit_and_none_is_there_twice(name, form, tokens, sizes):
    device = known_card(name).device
    call = Call(sizes, tokens, "bfloat16", form, "auto")
    try:
        path, _ = choose_path(call.problem(), device)
    except ValueError:  # fp8 where there is none
        return
    call = replace(call, path=path)
    wave = first_wave(call.problem(), device, path)
    assert wave[0] == heuristic_tiles(call.problem(), device, path) and 4 < len(wave) == len(set(wave)) < 40
    second = second_wave(call.problem(), device, path, wave[::-1], wave)
    assert not set(second) & set(wave) and len(second) <= 16
    for tiles in (*wave, *second):
        assert tuned_obstacle(call.problem(), device, path, tiles.variant, tiles.up, tiles.down) is None


def test_the_second_wave_combines_the_best():
    wave = first_wave(CALL.problem(), H200, "tma")
    own = wave[0]
    up = next(t for t in wave if t.up.num_stages == own.up.num_stages + 1 and t.down == own.down)
    down = next(t for t in wave if t.down.group_m == 32 and t.up == own.up)
    second = second_wave(CALL.problem(), H200, "tma", [up, down, own], wave)
    assert second[0] == replace(own, up=up.up, down=down.down)
    assert second_wave(CALL.problem(), H200, "tma", [], wave) == []


# The command.


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The command with fake workers; gives a function that runs it with a folder of tables, and returns its status."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.worker, "main", fake_worker.main)
    monkeypatch.setattr(compiler, "main", fake_worker.main)
    monkeypatch.chdir(tmp_path)
    settings_file = tmp_path / "settings.json"

    def run(*arguments, **values):
        settings_file.write_text(json.dumps(values))
        common = ["--out", str(tmp_path / "tables"), "--log", str(settings_file), "--workers", "2"]
        return main(["tune", *common, *arguments])

    return run


def asked(tmp_path) -> list[dict]:
    file = tmp_path / "settings.json.requests"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


SHAPE = ("--shape", "8,2,256,1024", "--tokens", "1,64")


def test_a_run_writes_a_table_that_calls_use(tuner, capsys, tmp_path, monkeypatch):
    json_file = tmp_path / "found.json"
    # Asked for, a plot without matplotlib is an error.
    plot = ("--plot", str(tmp_path)) if plots.available() else ()
    assert tuner(*SHAPE, "--json", str(json_file), *plot, crash=[{"up.num_stages": 5}]) == 0
    out = capsys.readouterr().out
    file = tmp_path / "tables" / "Fake_GPU" / CALL.bucket.file_name
    table = load_table(file, CALL.bucket)
    assert [entry.tokens for entry in table.entries] == [1, 64] and table.device == "Fake GPU"
    assert table.made.items() >= {"torch": "1", "triton": "2"}.items()
    assert os.listdir(file.parent) == [file.name]  # no journal, no temporary file
    assert "calls gain over the heuristic" in out and str(file) in out and "M=64: +" in out
    record = json.loads(json_file.read_text())
    (found,) = [call for call in record["tables"][0]["calls"] if call["tokens"] == 64]
    assert found["tiles"]["up"]["num_stages"] == 4 and found["ms"] < found["heuristic_ms"] and found["failed"]
    if plots.available():
        assert (tmp_path / "tune-E8-k2-H256-I1024-bfloat16.png").stat().st_size > 10_000
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path / "tables"))
    lookup.forget()
    tuned = lookup.tuned_tiles(CALL.problem(), replace(H200, name="Fake GPU"), "tma")
    assert (tuned.up, tuned.down) == (tiles_from_json(found["tiles"]).up, tiles_from_json(found["tiles"]).down)
    lookup.forget()


def test_what_is_tuned_is_not_tuned_again(tuner, capsys, tmp_path):
    assert tuner(*SHAPE) == 0
    asked(tmp_path)
    assert tuner(*SHAPE) == 0 and asked(tmp_path) == []
    assert "has M = 1, 64 already; --again tunes them anew" in capsys.readouterr().out
    assert tuner("--shape", "8,2,256,1024", "--tokens", "64,256") == 0
    assert {request["call"]["tokens"] for request in asked(tmp_path)} == {256}
    assert tuner(*SHAPE, "--again") == 0
    assert {request["call"]["tokens"] for request in asked(tmp_path)} == {1, 64}
    table = load_table(tmp_path / "tables" / "Fake_GPU" / CALL.bucket.file_name)
    assert [entry.tokens for entry in table.entries] == [1, 64, 256]


def test_equal_experts_are_tuned_once(tuner, tmp_path):
    models = ["--model", "qwen3-30b-a3b", "--shape", "128,8,2048,768", "--shape", "qwen3-30b-a3b"]
    assert tuner(*models, "--tokens", "64") == 0
    requests = [json.dumps(request, sort_keys=True) for request in asked(tmp_path)]
    assert len(requests) == len(set(requests)) and len(os.listdir(tmp_path / "tables" / "Fake_GPU")) == 1


def test_a_broken_table_is_replaced(tuner, capsys, tmp_path):
    file = tmp_path / "tables" / "Fake_GPU" / CALL.bucket.file_name
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert tuner(*SHAPE) == 0
    assert "it will be replaced" in capsys.readouterr().out and len(load_table(file).entries) == 2


def test_workers_that_do_not_start_end_the_run(tuner):
    with pytest.raises(SystemExit, match=r"3 workers in a row ended before they had done anything.*--log FILE"):
        tuner(*SHAPE, no_start=True)


# What a worker imports again has to be in the guard: torch alone takes seconds.
SCRIPT = """
if __name__ == "__main__":
    import sys, torch
    from moe_ops.cli import main, tune
    from moe_ops.cli.tuner import compiler
    from tests.unit import fake_worker
    torch.cuda.is_available = lambda: True
    tune.worker.main = compiler.main = fake_worker.main
    sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_leaves_whole_files_and_the_next_run_goes_on(tmp_path):
    """Killed by a signal nobody can catch, some times in a row: every table that is there can be read."""
    script, settings_file = tmp_path / "run.py", tmp_path / "settings.json"
    script.write_text(SCRIPT)
    settings_file.write_text(json.dumps({"sleep": 0.02}))
    arguments = ["tune", *SHAPE, "--out", str(tmp_path / "tables"), "--log", str(settings_file), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    folder, file = tmp_path / "tables" / "Fake_GPU", tmp_path / "settings.json.requests"
    seen = []
    for wanted in (10, 30, 60, None) if ALL else (10, 60, None):
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], env=environment, cwd=tmp_path, start_new_session=True
        )
        while wanted and process.poll() is None and len(seen) < wanted:
            time.sleep(0.02)
            seen = file.read_text().splitlines() if file.exists() else []
        if wanted and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait(120)
        assert status == (-signal.SIGKILL if wanted else 0)
        for table in folder.glob("E=*.json"):
            load_table(table, CALL.bucket)
    seen = file.read_text().splitlines()
    # Each kill loses no more than what its three workers were at.
    assert len(seen) - len(set(seen)) <= 3 * 3
    assert os.listdir(folder) == [CALL.bucket.file_name]
    assert [entry.tokens for entry in load_table(folder / CALL.bucket.file_name).entries] == [1, 64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a --model, a --shape or --common"),
        ([*SHAPE, "--device", "h200"], "--device is for --dry-run"),
        ([*SHAPE, "--dry-run", "--device", "h900"], "--device 'h900' is not a device that is known"),
        ([*SHAPE, "--dry-run", "--device", "a100", "--format", "fp8_block"], "fp8 needs 8.9"),
        ([*SHAPE, "--margin", "-1"], "'-1'"),
        ([*SHAPE, "--limit", "0"], "'0' is not a number above 0"),
        ([*SHAPE, "--dtype", "float32"], "'float32'"),
        (SHAPE, "needs a CUDA device, and torch sees none"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in error_of(capsys, "tune", *arguments)


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").touch()
    assert "pass another --out" in error_of(capsys, "tune", *SHAPE, "--out", str(tmp_path / "file" / "tables"))


def test_dry_run(capsys):
    text = output_of(capsys, "tune", *SHAPE, "--dry-run", "--device", "h200")
    others = len(first_wave(CALL.problem(), H200, "tma")) - 1
    assert f"M = 64, on NVIDIA H200: the heuristic's, and {others} others" in text
    assert text.count("direct") > 5


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "How it works" in text
    assert all(name in text for name in itertools.chain(FORMATS, ("--again", "--margin", "MOE_OPS_CONFIG_DIR")))
