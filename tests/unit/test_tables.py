"""Tables of tuned tiles without a GPU: broken files, buckets, interpolation, and what does not fit a device."""

import json
import logging
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops import plans
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.problems import describe_call
from moe_ops.dispatch import Override, make_plan, override
from moe_ops.tuning import TileConfig, lookup, tile_configs
from moe_ops.tuning.bucket import Bucket, bucket_of, device_folder
from moe_ops.tuning.files import ConfigError, read_json, write_atomically
from moe_ops.tuning.foreign import foreign_names, load_foreign
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import Entry, Table, Tiles, dump_table, load_table
from moe_ops.tuning.variants import choose_variant, variant_obstacle
from tests.unit.test_dispatch import A100, B200, GPUS, H100, H200, INTERPRETER, RTX_4090, by_name, problem
from tests.unit.test_house import ROOT

CONFIGS = lookup.PACKAGED
BF16, FP16 = torch.bfloat16, torch.float16
SIZES = (8, 2, 256, 1024)
BUCKET = Bucket(8, 256, 1024, 2, "bfloat16", "none", "tma")
TILES = Tiles("sorted", TileConfig(32, 64, 64, 4, 4, 3, True), TileConfig(32, 64, 128, 8, 4, 3))
TABLE = Table(
    BUCKET, "H200", (Entry(16, None, 0.1, 0.1), Entry(64, TILES, 0.2, 0.25), Entry(4096, TILES)), {"torch": "2.11"}
)


def call(tokens=64, dtype=BF16, form=None, **options):
    return describe_call(SIZES, tokens, dtype, form and FORMATS[form], **options)


@pytest.fixture(autouse=True)
def config_dir(tmp_path, monkeypatch):
    """An empty MOE_OPS_CONFIG_DIR, and no table of the package."""
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path / "none")
    lookup.forget()
    yield tmp_path
    lookup.forget()


def write(folder, table=TABLE, text=None, device="H200"):
    file = folder / device / table.bucket.file_name
    write_atomically(file, dump_table(table) if text is None else text)
    return file


# Files.


def test_packaged_tables():
    """Each is where it is looked for, and on its device every entry is taken."""
    found = [file for file in CONFIGS.rglob("*") if file.is_file()]
    assert found
    for file in found:
        table = load_table(file)
        assert file == CONFIGS / device_folder(table.device) / table.bucket.file_name
        device = replace(H100, name=table.device)
        for entry in table.entries:
            if entry.tiles is not None and table.bucket.format == "none":
                b = table.bucket
                sizes = b.experts, b.top_k, b.hidden, b.intermediate
                problem = describe_call(sizes, entry.tokens, getattr(torch, b.dtype))
                tiles = entry.tiles
                assert tuned_obstacle(problem, device, b.path, tiles.variant, tiles.up, tiles.down) is None


def test_a_table_comes_back(tmp_path):
    file = write(tmp_path)
    assert load_table(file, BUCKET) == TABLE
    assert json.loads(file.read_text())["entries"][0] == {"tokens": 16, "ms": 0.1, "heuristic_ms": 0.1}
    empty = replace(TABLE, entries=())
    assert load_table(write(tmp_path, empty), BUCKET) == empty
    assert os.listdir(file.parent) == [file.name]


def test_the_example_of_the_docs_is_a_table(tmp_path):
    text = (ROOT.parent / "docs" / "tuning.md").read_text()
    (tmp_path / "table.json").write_text(text.split("```json")[1].split("```")[0])
    table = load_table(tmp_path / "table.json")
    assert f"<folder>/{device_folder(table.device)}/{table.bucket.file_name}" in text
    assert [entry.tokens for entry in table.entries] == [16, 64]


def test_merged():
    newer = replace(TABLE, entries=(Entry(32), Entry(64)), made={"torch": "3.0"})
    assert TABLE.merged(newer).entries == (TABLE.entries[0], Entry(32), Entry(64), TABLE.entries[2])
    assert TABLE.merged(newer).made == {"torch": "3.0"}


BROKEN = {
    "schema": ({"schema": 2}, "schema is 2, expected an integer from 1 to 1"),
    "no-schema": ({"schema": ...}, "schema is missing"),
    "size": ({"hidden": 0}, "hidden is 0, expected an integer from 1"),
    "bool": ({"top_k": True}, "top_k is True, expected an integer"),
    "float": ({"top_k": 2.0}, "top_k is 2.0, expected an integer"),
    "dtype": ({"dtype": "float32"}, "dtype is 'float32', expected one of bfloat16, float16"),
    "format": ({"format": ["none"]}, "format is ['none'], expected one of none"),
    "other-bucket": ({"experts": 9}, "experts is 9, expected 8, as the file's name says"),
    "unknown": ({"colour": "red"}, "colour is not known"),
    "entries": ({"entries": {}}, "entries is {}, expected a list"),
    "entry": ({"entries": [3]}, "entries[0] is 3, expected an object"),
    "tokens": ({"entries": [{"tokens": -1}]}, "entries[0].tokens is -1"),
    "order": ({"entries": [{"tokens": 2}, {"tokens": 2}]}, "expected ascending ones"),
    "variant": ({"entries": [{"tokens": 2, "variant": "quick"}]}, "entries[0].variant is 'quick', expected one of"),
    "half-entry": ({"entries": [{"tokens": 2, "variant": "sorted"}]}, "entries[0].up is missing"),
    "tiles-alone": ({"entries": [{"tokens": 2, "up": {}}]}, "entries[0].up is not known"),
    "made": ({"made": {"host": "me"}}, "made.host is not known"),
    "ms": ({"entries": [{"tokens": 2, "ms": -3}]}, "entries[0].ms is -3, expected a number above 0"),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_errors_name_file_key_got_and_expected(tmp_path, change, words):
    value = {**json.loads(dump_table(TABLE)), **change}
    file = write(tmp_path, text=json.dumps({key: value for key, value in value.items() if value is not ...}))
    with pytest.raises(ConfigError) as error:
        load_table(file, BUCKET)
    assert str(error.value).startswith(f"{file}") and words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_m": 48}, "up: block_m is 48, expected a power of two"),
        ({"num_warps": 3}, "up: num_warps is 3"),
        ({"num_stages": 99}, "up.num_stages is 99, expected an integer from 1 to 8"),
        ({"swap_ab": 1}, "up.swap_ab is 1, expected true or false"),
        ({"block_q": 1}, "up.block_q is not known"),
    ],
)
def test_tiles_are_checked(tmp_path, change, words):
    value = json.loads(dump_table(TABLE))
    value["entries"][1]["up"] |= change
    with pytest.raises(ConfigError) as error:
        load_table(write(tmp_path, text=json.dumps(value)), BUCKET)
    assert f"entries[1].{words}" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": ' + b"9" * 100_000 + b"}", b" " * (1 << 21), b'{"schema": 1e999}',
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_what_is_no_table(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"file\.json"):
        load_table(file)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "nothing", "."):
        with pytest.raises(ConfigError):
            read_json(tmp_path / name)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(tmp_path / "pipe")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_drawn_change_is_an_error_or_a_table(tmp_path_factory, data):
    """Anywhere in a good table something else: never another exception, and never a tile that no kernel takes."""
    value = json.loads(dump_table(TABLE))
    place = value
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    file = tmp_path_factory.mktemp("drawn") / "table.json"
    file.write_text(json.dumps(value))
    try:
        assert isinstance(load_table(file), Table)
    except ConfigError as error:
        assert str(file) in str(error)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_drawn_bytes_are_an_error_or_a_table(tmp_path_factory, data):
    content = bytearray(dump_table(TABLE), "utf-8")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("drawn") / "table.json"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        load_table(file)
    except ConfigError as error:
        assert str(file) in str(error)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = write(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "half")
    assert load_table(file) == TABLE and os.listdir(file.parent) == [file.name]


# Buckets.


@pytest.mark.parametrize("form", ["none", *FORMATS])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_format_has_a_bucket_and_every_bucket_a_command(form, dtype):
    found = bucket_of(call(dtype=dtype, form=None if form == "none" else form), "tma")
    assert found == Bucket(8, 256, 1024, 2, str(dtype).removeprefix("torch."), form, "tma")
    assert "tune --shape 8,2,256,1024" in found.tune_command
    assert found.file_name.count("/") == 0


def test_calls_without_a_bucket():
    weights = torch.empty(8, 192, 128, device="meta")
    odd = torch.empty(8, 128, 192, dtype=BF16, device="meta").mT
    assert bucket_of(problem(dtype=torch.float32, w1=weights, w2=weights.new_empty(8, 128, 96)), "classic") is None
    assert bucket_of(problem(w1=odd), "tma") is None
    assert bucket_of(problem(activation="relu2_no_gate"), "tma") is None
    assert bucket_of(problem(), "tma") is not None


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("../../etc", "etc"),
        ("a/b\\c\n", "a_b_c"),
        ("", "unknown"),
    ],
)
def test_folder_of_a_device(name, folder):
    assert device_folder(name) == folder


# Which entry.


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


# What fits a device.

DRAWN_SIZES = st.tuples(
    st.sampled_from([1, 2, 8, 60, 128, 512]), st.sampled_from([1, 2, 6, 8]), st.sampled_from([128, 768, 2880, 7168]),
    st.sampled_from([64, 128, 256, 512, 768, 2048, 2880, 14336]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GPUS), st.sampled_from([BF16, FP16]), st.sampled_from([None, *FORMATS]), DRAWN_SIZES,
    st.integers(1, 1 << 17), st.sampled_from(["tma", "classic"]),
)  # fmt: skip
def test_the_heuristic_fits_every_device(device, dtype, form, sizes, tokens, path):
    drawn = describe_call(sizes, tokens, dtype, form and FORMATS[form])
    variant = choose_variant(drawn, device, path, batch_invariant=False)
    if variant_obstacle(variant, drawn, device, path) is None:
        up, down = tile_configs(drawn, device, path, variant, batch_invariant=False)
        assert tuned_obstacle(drawn, device, path, variant, up, down) is None


BASE = TileConfig(64, 64, 64, 8, 4, 3)


@pytest.mark.parametrize(
    ("device", "variant", "up", "down", "words"),
    [
        (RTX_4090, "sorted", replace(BASE, num_stages=8), BASE, "up takes 196608 bytes of shared memory, and RTX 4090"),
        (H200, "sorted", BASE, replace(BASE, block_m=128), "both must be the same"),
        (H200, "sorted", replace(BASE, block_n=256), BASE, "up has 32768 values for 4 warps, which hold 16384"),
        (
            H200,
            "sorted",
            BASE,
            replace(BASE, block_m=64, block_k=512, num_stages=1, block_n=32),
            "TMA box of 32 by 512",
        ),
        (H200, "pingpong", BASE, BASE, "only group_m and num_stages may differ"),
        (A100, "pingpong", BASE, BASE, "it needs the TMA path"),
        (H200, "direct", TileConfig(1, 64, 1024), TileConfig(1, 2, 128), "up has 131072 values"),
    ],
    ids=["shared", "block_m", "registers", "box", "form", "path", "direct"],
)
def test_what_does_not_fit(device, variant, up, down, words):
    path = "tma" if device == H200 else "classic"
    assert words in (tuned_obstacle(call(64), device, path, variant, up, down) or "")


@pytest.mark.parametrize("device", [H200, A100], ids=by_name)
def test_what_fits(device):
    assert tuned_obstacle(call(64), device, "classic", "sorted", BASE, BASE) is None
