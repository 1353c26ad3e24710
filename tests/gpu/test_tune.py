"""The tuner on a GPU: a small run from end to end, and a worker that outlives what its candidates do."""

import json
from dataclasses import asdict, replace

import pytest
import torch

import moe_ops
from moe_ops import plans
from moe_ops.cli import main
from moe_ops.cli.tuner import compiler, worker
from moe_ops.cli.tuner.calls import PARTS, Call, tiles_to_json
from moe_ops.cli.tuner.pool import Pool
from moe_ops.devices import describe
from moe_ops.dispatch import choose_path
from moe_ops.testing import assert_correct, random_inputs
from moe_ops.tuning import TileConfig, lookup
from moe_ops.tuning.bucket import bucket_of, device_folder
from moe_ops.tuning.lookup import heuristic_tiles
from moe_ops.tuning.table import Tiles, load_table

SIZES = {"hidden": 256, "intermediate": 128, "experts": 8, "top_k": 2}


def call(tokens: int = 64, form: str = "none") -> Call:
    """A small call on the path that the op would take here."""
    asked = Call((8, 2, 256, 128), tokens, "bfloat16", form, "auto")
    path, _ = choose_path(asked.problem(), describe(torch.device("cuda", torch.cuda.current_device())))
    return Call(asked.sizes, tokens, "bfloat16", form, path)


@pytest.mark.timeout(500)
def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    found = tmp_path / "found.json"
    arguments = ["--shape", "8,2,256,128", "--tokens", "1,64", "--out", str(tmp_path / "tables"), "--json", str(found)]
    monkeypatch.chdir(tmp_path)  # where the plot goes, if there is a matplotlib
    assert main(["tune", *arguments, "--log", str(tmp_path / "log")]) == 0
    print(capsys.readouterr().out)
    (table,) = json.loads(found.read_text())["tables"]
    assert [entry["tokens"] for entry in table["calls"]] == [1, 64]
    for entry in table["calls"]:
        assert 0 < entry["ms"] <= entry["heuristic_ms"] and entry["error"] is None
        assert len(entry["failed"]) < entry["candidates"] / 2, entry["failed"]
    bucket = call().bucket
    folder = tmp_path / "tables" / device_folder(torch.cuda.get_device_name())
    loaded = load_table(folder / bucket.file_name, bucket)
    assert [file.name for file in folder.iterdir()] == [bucket.file_name]

    # The op takes what was found, and is right.
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path / "tables"))
    monkeypatch.setattr(plans, "_plans", {})
    lookup.forget()
    try:
        for entry in loaded.entries:
            args = random_inputs(num_tokens=entry.tokens, dtype=torch.bfloat16, device="cuda", **SIZES)
            problem, plan = plans.plan(args)
            assert bucket_of(problem, plan.path) == bucket
            if entry.tiles is not None:
                assert Tiles(plan.variant, plan.up, plan.down) == entry.tiles and bucket.file_name in plan.source
            assert_correct(moe_ops.fused_moe(*args.tensors().values()), args)
    finally:
        lookup.forget()


@pytest.mark.timeout(300)
def test_a_worker_outlives_tiles_that_no_multiprocessor_holds():
    asked = call()
    own = heuristic_tiles(asked.problem(), describe(torch.device("cuda", 0)), asked.path)
    large = TileConfig(128, 128, 128, 8, 8, 8)

    def request(op: str, *tiles: Tiles, **more) -> dict:
        return {"op": op, "call": asked.to_json(), "candidates": [tiles_to_json(t) for t in tiles], **more}

    requests = [
        request("verify", Tiles("sorted", large, large)),
        request("race", own, Tiles("sorted", large, large), own, rounds=3),
        request("verify", own),
    ]
    answers = []
    with Pool(limit=120) as pool:
        pool.open("device", worker.main, (None,))
        assert pool.hello("device")["device"]["name"] == torch.cuda.get_device_name()
        for one in requests:
            pool.submit("device", one, answers.append)
        while len(answers) < len(requests):
            pool.step()
    failed, race, verified = answers
    assert failed.error is not None and failed.culprit == 0
    assert race.error is None and race.result[1] is None and list(race.failed) == [1]
    assert race.result[0] > 0 and race.result[2] == pytest.approx(race.result[0], rel=1)
    assert verified.error is None and 0 < verified.result["rms"] < 0.01


@pytest.mark.timeout(300)
def test_what_was_compiled_ahead_is_not_compiled_again():
    """A process without the device fills Triton's cache with the very kernels that the call then asks it for."""
    from triton import knobs

    asked = call(tokens=48)
    device = describe(torch.device("cuda", 0))
    own = heuristic_tiles(asked.problem(), device, asked.path)
    other = Tiles(own.variant, replace(own.up, group_m=3), replace(own.down, group_m=3))  # no other test's
    answers = []
    with Pool(limit=120) as pool:
        pool.open("compile", compiler.main, (None, asdict(device)), 2)
        for part in PARTS:
            one = {"op": "compile", "call": asked.to_json(), "candidates": [tiles_to_json(other)], "part": part}
            pool.submit("compile", one, answers.append)
        while len(answers) < len(PARTS):
            pool.step()
    assert [answer.error for answer in answers] == [None] * len(PARTS)
    args = random_inputs(num_tokens=48, dtype=torch.bfloat16, device="cuda", **SIZES)
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *_, src, cache_hit, **__: hits.append((src.name, cache_hit))
        worker.forced(args, asked.path, other)()
    assert len(hits) >= 2 and all(hit for _, hit in hits), (hits, knobs.cache.dir)
