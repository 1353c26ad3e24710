"""Files of tuned tiles without a GPU: written and read, broken ones, and which calls a table is for."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops.cli.formats import FORMATS
from moe_ops.cli.problems import describe_call
from moe_ops.tuning.bucket import Bucket, bucket_of, device_folder
from moe_ops.tuning.files import ConfigError, read_json, write_atomically
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.table import Entry, Table, dump_table, load_table
from tests.tables import BF16, BUCKET, CONFIGS, FP16, TABLE, call, write
from tests.unit.test_dispatch import H100, problem
from tests.unit.test_house import ROOT

pytestmark = pytest.mark.usefixtures("config_dir")


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
