"""`python -m moe_ops tune` without a GPU: candidates, the search, workers that crash or hang, what a kill leaves."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops.cli import main, plots, tune
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import CARDS, known_card
from moe_ops.cli.tuner.calls import Call, tiles_from_json, tiles_to_json
from moe_ops.cli.tuner.candidates import first_wave, second_wave
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Answer, Pool, PoolError
from moe_ops.cli.tuner.search import MARGIN, Search
from moe_ops.dispatch import choose_path
from moe_ops.tuning import lookup
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import load_table
from tests.unit import fake_worker
from tests.unit.test_cli import error_of, output_of
from tests.unit.test_house import ROOT

H200 = known_card("h200").device
CALL = Call((8, 2, 256, 1024), 64, "bfloat16", "none", "tma")


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


# The search.


class FakeRunner:
    """Answers by functions of the candidate; counts what it was asked."""

    def __init__(self, ms=fake_worker.milliseconds, error=lambda op, candidate: None):
        self.ms, self.error, self.asked = ms, error, []

    def run(self, requests, *, alone, done):
        for number, request in enumerate(requests):
            assert alone == (request["op"] != "trial")
            self.asked.append(request)
            done(number, self.answer(request))

    def answer(self, request) -> Answer:
        for index, candidate in enumerate(request["candidates"]):
            if error := self.error(request["op"], candidate):
                return Answer(error=error, culprit=index)
        if request["op"] == "race":
            return Answer([self.ms(candidate) for candidate in request["candidates"]])
        return Answer({})


def search(tmp_path, runner, calls=(CALL,)):
    founds = []
    journal = Journal(tmp_path / "journal", {"device": "H200"})
    Search(H200, runner, journal).run(calls, founds.append)
    journal.close()
    return founds


OWN = heuristic_tiles(CALL.problem(), H200, "tma")


def test_the_best_of_both_gemms_wins(tmp_path):
    runner = FakeRunner()
    (found,) = search(tmp_path, runner)
    assert found.entry.tiles.up.num_stages == 4 and found.entry.tiles.down.group_m == 32
    assert found.entry.ms < found.entry.heuristic_ms == fake_worker.milliseconds(tiles_to_json(OWN))
    assert found.failed == {} and found.candidates == sum(request["op"] == "trial" for request in runner.asked)
    verified = [request["candidates"][0] for request in runner.asked if request["op"] == "verify"]
    assert verified == [tiles_to_json(found.entry.tiles)]


def test_less_than_the_margin_is_noise(tmp_path):
    own = tiles_to_json(OWN)
    (found,) = search(tmp_path, FakeRunner(ms=lambda candidate: 1.0 if candidate == own else 1 - MARGIN * 0.9))
    assert found.entry.tiles is None and found.entry.ms == found.entry.heuristic_ms == 1.0


def test_a_win_has_to_happen_twice(tmp_path):
    """Every race but the final ones says that something is twice as fast."""
    own = tiles_to_json(OWN)

    class Luck(FakeRunner):
        def answer(self, request):
            if request["op"] != "race":
                return Answer({})
            final = len(request["candidates"]) == 2
            return Answer([1.0 if candidate == own or final else 0.5 for candidate in request["candidates"]])

    (found,) = search(tmp_path, Luck())
    assert found.entry.tiles is None


def test_a_winner_that_is_wrong_is_not_taken(tmp_path):
    def error(op, candidate):
        return "rms error is above" if op == "verify" and candidate["down"]["group_m"] == 32 else None

    (found,) = search(tmp_path, FakeRunner(error=error))
    assert found.entry.tiles is None or found.entry.tiles.down.group_m != 32
    assert any("wrong result: rms error is above" in reason for reason in found.failed.values())


def test_a_candidate_that_takes_a_race_with_it_is_left_out(tmp_path):
    def error(op, candidate):
        return "its process ended" if op == "race" and candidate["up"]["num_stages"] == 4 else None

    (found,) = search(tmp_path, FakeRunner(error=error))
    assert found.entry.tiles.up.num_stages == 5  # as fast as four, by the fake's formula
    assert found.failed and set(found.failed.values()) == {"its process ended"}


def test_a_heuristic_that_fails_is_said(tmp_path):
    own = tiles_to_json(OWN)
    (found,) = search(tmp_path, FakeRunner(error=lambda op, candidate: "broken" if candidate == own else None))
    assert found.entry is None and found.error == "the heuristic's own tiles failed: broken"


def test_calls_are_told_one_by_one(tmp_path):
    calls = [replace(CALL, tokens=tokens) for tokens in (1, 64, 4096)]
    founds = search(tmp_path, FakeRunner(), calls)
    assert [found.call.tokens for found in founds] == [1, 64, 4096]
    assert all(found.entry is not None for found in founds)


def test_what_the_journal_has_is_not_asked_again(tmp_path):
    first, second = FakeRunner(), FakeRunner()
    founds = search(tmp_path, first)
    assert search(tmp_path, second)[0].entry == founds[0].entry
    assert second.asked == []


def test_what_failed_without_a_candidate_is_asked_again(tmp_path):
    class Full(FakeRunner):
        def answer(self, request):
            return Answer(error="out of memory")

    assert search(tmp_path, Full())[0].entry is None
    assert search(tmp_path, FakeRunner())[0].entry is not None


# The journal.


def test_a_journal_survives_what_cuts_it_off(tmp_path):
    file, head = tmp_path / "folder" / "journal", {"device": "H200"}
    journal = Journal(file, head)
    journal.put("a", 1)
    journal.put("b", {"c": None})
    journal.close()
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        journal = Journal(file, head)
        journal.put("z", 2)
        journal.close()
        again = Journal(file, head)
        assert again.get("z") == 2 and again.get("a") in (None, 1) and again.get("b") in (None, {"c": None})
        again.close()
    file.write_bytes(content + b"\xff[[{\n[1]\n")
    journal = Journal(file, head)
    assert len(journal) == 2 and journal.get("b") == {"c": None}
    journal.remove()
    assert not file.exists()


def test_a_journal_of_other_versions_is_begun_anew(tmp_path):
    journal = Journal(tmp_path / "journal", {"triton": "3.6"})
    journal.put("a", 1)
    journal.close()
    assert len(Journal(tmp_path / "journal", {"triton": "3.7"})) == 0


# Workers.


@pytest.fixture
def start(tmp_path):
    """Makes a pool of fake workers with settings; the file that they note their requests in is its second."""
    pools = []

    def make(limit=2.0, **values):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(values))
        pools.append(Pool(fake_worker.main, (str(file),), limit=limit))
        return pools[-1], Path(f"{file}.requests")

    yield make
    for pool in pools:
        pool.shrink(0)


def requests(wave, op="trial"):
    return [{"op": op, "call": CALL.to_json(), "candidates": [tiles_to_json(tiles)]} for tiles in wave]


WAVE = first_wave(CALL.problem(), H200, "tma")
STAGES = [tiles.up.num_stages for tiles in WAVE]


def test_workers_answer_in_order(start):
    pool, noted = start()
    assert pool.hello()["device"]["name"] == "Fake GPU"
    asked = requests(WAVE, "race")
    heard = []
    answers = pool.run(asked, 2, lambda number, answer: heard.append(number))
    assert [answer.result for answer in answers] == [[fake_worker.milliseconds(r["candidates"][0])] for r in asked]
    assert sorted(heard) == list(range(len(asked))) and len(noted.read_text().splitlines()) == len(asked)
    assert pool.run([], 2) == []


def test_a_crash_and_a_hang_cost_only_themselves(start):
    pool, _ = start(limit=1.0, crash=[{"up.num_stages": 5}], hang=[{"down.group_m": 32}], fail=[{"up.group_m": 32}])
    answers = pool.run(requests(WAVE), 2)
    kinds = {"its process ended with status 3": 0, "it hung for 1 s": 0, "RuntimeError: fail": 0, None: 0}
    for tiles, answer in zip(WAVE, answers, strict=True):
        kinds[answer.error] += 1
        assert (answer.culprit is None) == (answer.error is None)
        if tiles.up.num_stages == 5:
            assert answer.error == "its process ended with status 3"
        elif tiles.down.group_m == 32:
            assert answer.error == "it hung for 1 s"
        elif tiles.up.group_m == 32:
            assert answer.error == "RuntimeError: fail"
    assert min(kinds.values()) >= 1 and sum(kinds.values()) == len(WAVE)


def test_workers_that_do_not_start(start):
    pool, _ = start(no_start=True)
    with pytest.raises(PoolError, match=r"3 workers in a row ended before they had done anything: .* status 7"):
        pool.hello()


# The command.


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The command with fake workers; gives a function that runs it with a folder of tables, and returns its status."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.worker, "main", fake_worker.main)
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
    trials = [json.dumps(request, sort_keys=True) for request in asked(tmp_path) if request["op"] == "trial"]
    assert len(trials) == len(set(trials)) and len(os.listdir(tmp_path / "tables" / "Fake_GPU")) == 1


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
    from tests.unit import fake_worker
    torch.cuda.is_available = lambda: True
    tune.worker.main = fake_worker.main
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
    for wanted in (10, 30, 60, None):
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
    # Each kill loses no more than what its workers were at.
    assert len(seen) - len(set(seen)) <= 3 * 2
    assert os.listdir(folder) == [CALL.bucket.file_name]
    assert [entry.tokens for entry in load_table(folder / CALL.bucket.file_name).entries] == [1, 64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a --model or a --shape"),
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
    assert f"M = 64, on NVIDIA H200: the heuristic's, and {len(WAVE) - 1} others" in text
    assert text.count("direct") > 5


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "How it works" in text
    assert all(name in text for name in itertools.chain(FORMATS, ("--again", "--margin", "MOE_OPS_CONFIG_DIR")))
