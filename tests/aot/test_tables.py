"""Launch tables: what is compiled ahead of time, for which numbers of tokens, and what is refused.

That the launches are Python's is held by tests/cpp/test_cuda.py, which asks the C++ library.
"""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_ops.aot.calls import call_text, parse_call
from moe_ops.aot.counts import Trace
from moe_ops.aot.cubin import parameter_sizes
from moe_ops.aot.recording import record
from moe_ops.aot.table import entries, write_table
from moe_ops.backends import tma
from moe_ops.cli import main
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.tuning import lookup
from moe_ops.tuning.bucket import bucket_of, device_folder
from moe_ops.tuning.table import Entry, Table, dump_table
from tests.amount import in_full
from tests.aot.harness import DEVICES, compiling, make_call

DEVICE = DEVICES[90]
SMALL = {"hidden": 256, "intermediate": 128, "experts": 8, "top_k": 2}


def test_counts():
    """A number at other numbers of tokens is what Python computes there; conditions bound where that holds."""

    def compute(m):
        blocks = -(-m * 8 // 64)
        return [m + 1, 3 - m, m * 2 % 7, blocks, torch.sym_min(m, 40) * 5, (blocks + 3) // (m + 1)]

    trace = Trace(50)
    counts = compute(trace.tokens)
    for num_tokens in (1, 7, 39, 40, 41, 1000):
        assert trace.holds(num_tokens)
        assert [count.at(num_tokens) for count in counts] == compute(num_tokens)
    assert counts[4].text == "M 40 min 5 *"
    assert max(trace.tokens, 45).at(60) == 60
    assert trace.holds(46) and not trace.holds(44)
    assert range(100)[trace.tokens] == 50 and not trace.holds(51)


def test_formulas_of_conditions_alone():
    trace = Trace(50)
    assert trace.tokens / 4 < 13
    assert trace.holds(51) and not trace.holds(52)
    with pytest.raises(ValueError, match="more than"):
        (trace.tokens / 4).text  # noqa: B018


def test_ranges_are_whole_and_few():
    """Every number of tokens is in one entry, and what decides where one begins is on either side of its ends."""
    found = [(first, last) for first, last, _ in entries(call_text(make_call(5, **SMALL)), 1, 5000, DEVICE)]
    assert found[0][0] == 1 and found[-1][1] == 5000 and len(found) < 20
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(found))


def test_a_table_is_the_same_twice(tmp_path):
    """So are its file and those of its kernels: other calls' stay beside them."""
    text = call_text(make_call(1, **SMALL))
    path = write_table(tmp_path, text, 1, 3, DEVICE)
    content, files = path.read_text(), sorted(tmp_path.iterdir())
    assert write_table(tmp_path, text, 1, 3, DEVICE) == path
    assert path.read_text() == content and sorted(tmp_path.iterdir()) == files
    assert write_table(tmp_path, call_text(make_call(1, **SMALL, activation="gelu")), 1, 1, DEVICE) != path
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w1", "'w1' is no tensor, expected NAME=DTYPE[SIZE,...]"),
        ("w1=bfloat16[M,x]", "'w1=bfloat16[M,x]' is no tensor"),
        ("w1=float17[2]", "is no tensor"),
        ("weight=1", "'weight=1' is no argument"),
        ("reduce_topk=no", "has no value of reduce_topk"),
        ("hidden_states=bfloat16[M,8]", "lacks w1, w2, topk_weights, topk_ids"),
    ],
)
def test_bad_texts(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_call(text, 1)


def test_paths_without_tables(capsys, tmp_path):
    """What takes another path in Python is not compiled, and the command says why."""
    text = call_text(make_call(1, **SMALL, dtype=torch.float32))
    assert main(["aot", "--shapes", text, "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert "only 'tma' is compiled ahead of time" in capsys.readouterr().err


def test_tuned_tiles(tmp_path, monkeypatch):
    """They count ahead of time as well, and bound the entries where they begin and end."""
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path))
    args = make_call(64, **SMALL)
    bucket = bucket_of(make_problem(args), "tma")
    tiles = lookup.heuristic_tiles(make_problem(args), DEVICE, "tma")
    tuned = replace(tiles, down=replace(tiles.down, num_stages=tiles.down.num_stages - 1))
    folder = tmp_path / device_folder(DEVICE.name)
    folder.mkdir()
    (folder / bucket.file_name).write_text(dump_table(Table(bucket, DEVICE.name, (Entry(64, tuned, 0.1, 0.2),))))
    lookup.forget()
    try:
        for num_tokens in (33, 64, 100, 300):
            call = record(make_call(num_tokens, **SMALL), DEVICE)
            plan = make_plan(make_problem(make_call(num_tokens, **SMALL)), DEVICE)
            assert call.plan.down == plan.down and call.plan.source == plan.source
        assert record(args, DEVICE).plan.down == tuned.down
        assert not record(args, DEVICE).trace.holds(300)
    finally:
        lookup.forget()


@in_full
def test_parameters_are_those_of_the_ptx():
    """The cubin's own list of parameters against the one in its source, kernel by kernel."""
    with compiling(90) as launches:
        for num_tokens in (1, 64, 1100):
            args = make_call(num_tokens, **SMALL, fp8="block")
            problem = make_problem(args)
            tma.run(args, problem, make_plan(problem, DEVICE), args.hidden_states.new_empty(problem.out_shape))
    assert {kernel.__name__ for kernel, _ in launches} >= {"up_kernel", "blockscaled_kernel", "gemv_down_kernel"}
    for _, compiled in launches:
        declared = re.search(r"\.entry \w+\((.*?)\)\n", compiled.asm["ptx"], re.S)[1].split(",")
        sizes = [
            int(re.search(r"\.b8 \w+\[(\d+)\]|\.[a-z](\d+) ", line).group(1) or width_of(line)) for line in declared
        ]
        assert parameter_sizes(compiled.asm["cubin"], compiled.metadata.name) == sizes


def width_of(declared: str) -> int:
    """Bytes of ".param .u64 ..."."""
    return int(re.search(r"\.[a-z](\d+) ", declared)[1]) // 8
