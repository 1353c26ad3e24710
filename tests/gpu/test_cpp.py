"""The C++ CUDA kernel on a GPU: without Python's package, and without Python, its results are Python's to the bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

# A warm cache knows an op by its name alone and would hide a change of its schema.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from moe_ops.aot.calls import call_text
from moe_ops.aot.table import write_table
from moe_ops.devices import describe
from moe_ops.plans import plan
from moe_ops.testing import quantized_inputs, random_inputs
from scripts import build_cpp

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
# Compilers, and a process for each test.
pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.skipif(CAPABILITY != (9, 0), reason="tables are made for Hopper"),
    pytest.mark.skipif(build_cpp.compiler() is None, reason="no C++ compiler: install g++, or set CXX"),
]

SIZES = {"hidden": 512, "intermediate": 384, "experts": 8, "top_k": 2}
BFLOAT16 = {**SIZES, "dtype": torch.bfloat16}
# (how inputs are drawn, their options, numbers of tokens: every variant, both sorts, multiples of 16 and others)
CALLS = {
    "bfloat16": (random_inputs, BFLOAT16, (1, 2, 17, 64, 255, 300, 512, 1100, 4096)),
    "float16_options": (
        random_inputs,
        {
            **SIZES, "dtype": torch.float16, "bias": True, "activation": "swigluoai", "gate_up_layout": "interleaved",
            "index_dtype": torch.int64, "routed_scaling_factor": 2.5, "apply_router_weight_on_input": True,
        },
        (1, 5, 64, 600),
    ),
    "summands": (random_inputs, {**BFLOAT16, "reduce_topk": False, "out_dtype": torch.float32}, (1, 33, 700)),
    "hostile": (random_inputs, {**BFLOAT16, "routing": "hostile"}, (1, 40, 700)),
    "fp8_block": (
        quantized_inputs,
        {**SIZES, "quantization": "fp8_w8a8", "block_shape": (128, 128)},
        (1, 3, 16, 64, 300, 512, 2000, 4096),
    ),
    "int4": (
        quantized_inputs,
        {**SIZES, "quantization": "int4_w4a16", "block_shape": (0, 128), "zero_points": True},
        (1, 40, 75, 700),
    ),
    "int8_weights": (
        quantized_inputs, {**SIZES, "quantization": "int8_w8a16", "granularity": "channel"}, (1, 40, 150, 700)
    ),
    "fp8_channel": (quantized_inputs, {**SIZES, "quantization": "fp8_w8a8", "granularity": "channel"}, (1, 9, 64, 700)),
}  # fmt: skip
# Variants beside those for few rows.
MANY = {"fp8_block": {"blockscaled"}, "int4": {"packed", "mixed"}, "int8_weights": {"mixed"}}

# argv: the library, calls, results. Each call eagerly, into a given buffer, in a CUDA graph and on another stream.
CHILD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op, op_ = torch.ops.moe_ops.fused_moe_tma, torch.ops.moe_ops.fused_moe_tma_
results = []
for call in torch.load(sys.argv[2]):
    out = op(**call)
    results.append(out)
    given = torch.full_like(out, torch.nan)
    op_(given, **call)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        beside = op(**call)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(**call)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(given, out) and torch.equal(beside, out) and torch.equal(captured, out)
empty = {name: value[:0] if name in ("hidden_states", "topk_weights", "topk_ids") else value
         for name, value in call.items()}
assert op(**empty).shape == (0, *out.shape[1:])
for change, words in (
    ({"activation": "silu_no_gate"}, "python -m moe_ops aot --arch 90 --shapes 'hidden_states="),
    ({"hidden_states": call["hidden_states"].T.contiguous().T}, "pass hidden_states.contiguous()"),
    ({"w1": call["w1"].cpu()}, "w1 is on the CPU, expected cuda:"),
    ({"path": "classic"}, "path is 'classic', expected 'auto' or 'tma'"),
    ({"topk_ids": call["topk_ids"][:-1]}, "rows, as hidden_states has"),
):
    try:
        op(**{**call, **change})
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
assert not {"moe_ops", "triton"} & set(sys.modules)
torch.save(results, sys.argv[3])
"""


def run(*command: object, **env: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in env.items()}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=400)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of library and runner."""
    folder = tmp_path_factory.mktemp("cpp")
    done = run(sys.executable, ROOT / "scripts" / "build_cpp.py", "--out", folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", CALLS)
def test_results_are_pythons(built, tmp_path, name):
    draw, options, tokens = CALLS[name]
    calls = [draw(num_tokens=n, device="cuda", seed=n, **options) for n in tokens]
    write_table(tmp_path, call_text(calls[0]), 1, max(tokens), describe(torch.device("cuda", 0)))
    variants = {plan(args)[1].variant for args in calls}
    assert variants == {"direct", "sorted", *MANY.get(name, {"pingpong"})}
    # Ids drawn as int64 are columns of a wider tensor.
    for args in calls:
        args.topk_ids = args.topk_ids.contiguous()
    named = [{field: getattr(args, field) for field in args.__slots__} for args in calls]
    expected = [torch.ops.moe_ops.fused_moe_tma(**call) for call in named]
    torch.save(named, tmp_path / "calls.pt")
    done = run(
        sys.executable, "-c", CHILD, built / "libmoe_ops.so", tmp_path / "calls.pt", tmp_path / "results.pt",
        MOE_OPS_AOT=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = torch.load(tmp_path / "results.pt")
    for num_tokens, want, got in zip(tokens, expected, results, strict=True):
        assert got.isfinite().all() and got.abs().max() > 0.01
        assert torch.equal(got, want), f"M = {num_tokens}: {(got != want).sum()} of {got.numel()} elements differ"


def test_package_without_python(built, tmp_path):
    """docs/cpp.md, on a GPU: a package made in Python runs in a process without Python, Triton or a compiler."""
    done = run(sys.executable, ROOT / "examples" / "package_for_cpp.py", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    command = (
        built / "run_package", tmp_path / "block.pt2", tmp_path / "inputs.pt", "--library", built / "libmoe_ops.so",
        "--expect", tmp_path / "expected.pt", "--output", tmp_path / "output.pt",
    )  # fmt: skip
    refused = run(*command)
    assert refused.returncode == 2 and "MOE_OPS_AOT is not set" in refused.stderr + refused.stdout
    shapes = re.search(r"now: python -m moe_ops aot --shapes '(.*?)' --out", done.stdout)[1]
    assert f"--shapes '{shapes}'" in refused.stderr + refused.stdout
    made = run(
        sys.executable,
        "-m",
        "moe_ops",
        "aot",
        "--shapes",
        shapes,
        "--tokens",
        "1-64",
        "--out",
        tmp_path,
        "--multiprocessors",
        describe(torch.device("cuda", 0)).num_sms,
    )
    assert made.returncode == 0, made.stderr
    ran = run(*command, MOE_OPS_AOT=tmp_path, LD_DEBUG="files")
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert ran.stdout.endswith("as expected\n")
    assert "libcuda.so.1" in ran.stderr
    assert "libpython" not in ran.stderr and "libtorch_python" not in ran.stderr
    (got,), (expected,) = torch.load(tmp_path / "output.pt"), torch.load(tmp_path / "expected.pt")
    assert torch.equal(got, expected)
