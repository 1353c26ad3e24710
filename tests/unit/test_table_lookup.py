"""Which tuned tiles a call gets: from tables, between their entries, and from files of vLLM and SGLang."""

import json
import logging
from dataclasses import replace

import pytest

from moe_ops import plans
from moe_ops.dispatch import Override, make_plan, override
from moe_ops.tuning import TileConfig, lookup, tile_configs
from moe_ops.tuning.files import ConfigError
from moe_ops.tuning.foreign import foreign_names, load_foreign
from moe_ops.tuning.table import Entry, Tiles
from moe_ops.tuning.variants import choose_variant
from tests.tables import BUCKET, FP16, TABLE, TILES, call, write
from tests.unit.test_dispatch import A100, B200, H200, INTERPRETER

pytestmark = pytest.mark.usefixtures("config_dir")


def heuristic(tokens, device=H200):
    variant = choose_variant(call(tokens), device, "tma", batch_invariant=False)
    return variant, *tile_configs(call(tokens), device, "tma", variant, batch_invariant=False)


def chosen(tokens, device=H200, **options):
    plan = make_plan(call(tokens, **options), device)
    return plan.variant, plan.up, plan.down


def test_near():
    assert [TABLE.near(m) and TABLE.near(m).tokens for m in (0, 1, 8, 16, 31, 33, 64, 128, 129, 2047, 2048, 8192)] == [
        None, None, 16, 16, 16, 64, 64, 64, None, None, 4096, 4096,
    ]  # fmt: skip


def test_tuned_tiles_are_used_where_they_were_measured(config_dir):
    assert chosen(64) == heuristic(64)
    file = write(config_dir)
    assert chosen(64) == heuristic(64)  # files are looked for once
    lookup.forget()
    assert chosen(64) == (TILES.variant, TILES.up, TILES.down)
    plan = make_plan(call(64), H200)
    assert plan.source == f"{file}, tokens 64" and plan.max_tiles * 32 == plan.max_rows
    assert chosen(16) == heuristic(16) and make_plan(call(16), H200).source == "heuristic"
    assert chosen(600) == heuristic(600)


def test_between_entries_only_where_the_heuristic_does_not_change(config_dir):
    write(config_dir)
    for tokens in range(33, 129):
        same = heuristic(tokens) == heuristic(64)
        assert chosen(tokens) == ((TILES.variant, TILES.up, TILES.down) if same else heuristic(tokens))
    assert {heuristic(tokens) == heuristic(64) for tokens in range(33, 129)} == {True, False}


def test_what_a_table_does_not_reach(config_dir, monkeypatch):
    write(config_dir)
    assert make_plan(call(64, dtype=FP16), H200).source == "heuristic"
    assert make_plan(call(64), replace(H200, name="H100")).source == "heuristic"
    assert make_plan(call(64, path="classic"), H200).source == "heuristic"
    assert make_plan(call(64, path="tma"), INTERPRETER).source == "heuristic"
    with override(Override(variant="sorted")):
        assert make_plan(call(64), H200).source == "heuristic"
    with override(Override(up=TILES.down, down=TILES.down)):
        assert make_plan(call(64), H200).source == "forced"
    with override(Override(path="tma")):
        assert make_plan(call(64), H200).up == TILES.up
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    assert make_plan(call(64), H200).source == "heuristic"


def test_a_folder_of_an_architecture_serves_its_devices(config_dir):
    write(config_dir, device="sm_90")
    assert chosen(64) == chosen(64, replace(H200, name="H100")) == (TILES.variant, TILES.up, TILES.down)
    assert chosen(64, B200) == heuristic(64, B200)
    lookup.forget()
    write(config_dir, replace(TABLE, entries=(Entry(64),)))
    assert chosen(64) == heuristic(64) and chosen(64, replace(H200, name="H100"))[1] == TILES.up


def test_one_warning_for_a_broken_file_and_none_for_its_absence(config_dir, caplog):
    write(config_dir, text="{")
    for tokens in (16, 64):
        assert chosen(tokens) == heuristic(tokens)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert BUCKET.file_name in caplog.text


def test_one_warning_for_an_entry_that_does_not_fit(config_dir, caplog):
    large = Tiles("sorted", TileConfig(128, 128, 128, 8, 8, 8), TileConfig(128, 128, 64))
    write(config_dir, replace(TABLE, entries=(Entry(64, large),)))
    for _ in range(2):
        assert chosen(64) == heuristic(64)
    assert len(caplog.records) == 1 and "the entry for 64 tokens is left out: up takes" in caplog.text


def test_one_line_for_a_missing_table(caplog):
    caplog.set_level(logging.INFO, "moe_ops")
    for tokens in (16, 64):
        make_plan(call(tokens), H200)
    make_plan(call(64, form="fp8_block"), H200)
    make_plan(call(64, path="classic"), A100)
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    commands = [record.getMessage().split("to make them: ")[1] for record in caplog.records]
    assert commands == [
        "python -m moe_ops tune --shape 8,2,256,1024 --dtype bfloat16",
        "python -m moe_ops tune --shape 8,2,256,1024 --dtype bfloat16 --format fp8_block",
        "python -m moe_ops tune --shape 8,2,256,1024 --dtype bfloat16 --path classic",
    ]


def test_a_call_that_was_planned_looks_no_file_up(monkeypatch):
    from moe_ops.testing import random_inputs

    monkeypatch.setattr(plans, "_plans", {})
    args = random_inputs(num_tokens=4, hidden=16, intermediate=8, experts=3, top_k=2)
    plans.plan(args)
    monkeypatch.setattr(lookup, "tuned_tiles", lambda *_: pytest.fail("looked up"))
    monkeypatch.setattr("moe_ops.env.config_dir", lambda: pytest.fail("read the environment"))
    plans.plan(args)


def test_a_config_dir_that_cannot_be_read(config_dir, caplog, monkeypatch):
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(config_dir / ("x" * 300)))
    assert chosen(64) == heuristic(64)
    assert all(record.levelname == "WARNING" for record in caplog.records)


# Files of others.

VLLM = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 16,
    "num_warps": 8,
    "num_stages": 4,
}
CLASSIC = replace(BUCKET, path="classic")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("none", "E=8,N=1024,device_name=NVIDIA_H200.json"),
        ("fp8_tensor", "E=8,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"),
        ("fp8_block", "E=8,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"),
        ("fp8_block", "E=8,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"),
        ("int8_channel", "E=8,N=1024,device_name=NVIDIA_H200,dtype=int8_w8a8,per_channel_quant=True.json"),
        ("int8_weights", "E=8,N=1024,device_name=NVIDIA_H200,dtype=int8_w8a16.json"),
        ("int4", "E=8,N=1024,device_name=NVIDIA_H200,dtype=int4_w4a16.json"),
    ],
)
def test_their_names(form, name):
    assert name in list(foreign_names(replace(CLASSIC, format=form), "NVIDIA H200"))
    assert list(foreign_names(replace(BUCKET, format=form), "NVIDIA H200")) == []


def test_their_tiles(tmp_path):
    file = tmp_path / "E=8,N=1024,device_name=H200.json"
    file.write_text(json.dumps({"triton_version": "3.6.0", "64": {**VLLM, "USE_TMA": True}, "1": VLLM}))
    table = load_foreign(file, CLASSIC, "H200")
    up, down = TileConfig(64, 64, 64, 16, 8, 4), TileConfig(64, 128, 64, 16, 8, 4)
    assert table.entries == (Entry(1, Tiles("sorted", up, down)), Entry(64, Tiles("sorted", up, down)))
    down_file = tmp_path / "E=8,N=1024,device_name=H200_down.json"
    down_file.write_text(json.dumps({"128": {**VLLM, "BLOCK_SIZE_M": 128, "num_stages": 2}}))
    assert load_foreign(file, CLASSIC, "H200").entries[1].tiles.down == replace(down, num_stages=2)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "has no tiles"),
        ({"x": VLLM}, "the key 'x' is not a number of tokens"),
        ({"1": {**VLLM, "BLOCK_SIZE_K": 0}}, "1.BLOCK_SIZE_K is 0"),
        ({"1": {**VLLM, "BLOCK_SIZE_M": 48}}, "1: block_m is 48"),
        ({"1": {**VLLM, "COLOUR": 1}}, "1.COLOUR is not known"),
        ([], "expected an object"),
    ],
)
def test_their_broken_files(tmp_path, value, words):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError) as error:
        load_foreign(file, CLASSIC, "H200")
    assert words in str(error.value)


@pytest.mark.parametrize("folder", [".", "triton_3_6_0"])
def test_their_files_serve_the_classic_path(config_dir, folder):
    name = "E=8,N=1024,device_name=A100.json"
    (config_dir / folder).mkdir(exist_ok=True)
    (config_dir / folder / name).write_text(json.dumps({"1": VLLM, "64": VLLM}))
    plan = make_plan(call(64), A100)
    assert (plan.up, plan.down) == (TileConfig(64, 64, 64, 16, 8, 4), TileConfig(64, 128, 64, 16, 8, 4))
    assert name in plan.source
    assert make_plan(call(1), A100).variant == "direct"
    assert make_plan(call(64), H200).source == "heuristic"


def test_the_newest_triton_first(config_dir):
    for version, stages in (("3_9_0", 2), ("3_10_1", 3)):
        (config_dir / f"triton_{version}").mkdir()
        file = config_dir / f"triton_{version}" / "E=8,N=1024,device_name=A100.json"
        file.write_text(json.dumps({"64": {**VLLM, "num_stages": stages}}))
    assert make_plan(call(64), A100).up.num_stages == 3
