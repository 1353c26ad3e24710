"""The examples, run as a user runs them, with small settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.amount import in_full

ROOT = Path(__file__).resolve().parents[2]
# Runs an example whose experts are wrong by 10 %.
BROKEN = """
import runpy, sys
import moe_ops.integrations.transformers as integration
integration.fused_moe = lambda *args, right=integration.fused_moe, **kwargs: right(*args, **kwargs) * 1.1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "MOE_OPS_EXAMPLE_QUICK": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)


def test_quickstart():
    done = run(ROOT / "examples" / "quickstart.py")
    assert done.returncode == 0, done.stderr
    assert "result: [64, 512] torch." in done.stdout
    assert re.search(r"^path: (cpu|classic|tma) \(.+\)$", done.stdout, re.M)


def test_cuda_graph():
    """The same lines every time, and a note where there is no graph."""
    example = ROOT / "examples" / "cuda_graph.py"
    first, second = (run(example, "--device", "cpu") for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    note, *lines = first.stdout.splitlines()
    assert note == "no CUDA graph: the steps run eagerly on the CPU"
    assert len(lines) == 12 and all(line.endswith(": equal to a call of its own") for line in lines)
    assert second.stdout == first.stdout


def test_generate(tmp_path):
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "generate.py"
    options = ("--device", "cpu", "--cache", tmp_path, "--prompt", "The op", "--tokens", "12")
    done = run(example, *options)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"loss (\S+) at the start, (\S+) at the end", done.stdout).groups())
    assert last < first - 0.3
    assert "prompt: 'The op'" in done.stdout and ": agree\n" in done.stdout
    assert "  1 token(s): cpu (the tensors are on the CPU)\n" in done.stdout
    for name in ("eager", "grouped_mm", "moe_ops"):
        assert float(re.search(rf"^  {name} +(\S+) tokens/s$", done.stdout, re.M)[1]) > 0

    # The second run takes the weights of the first, and notices experts that are wrong.
    done = run("-c", BROKEN, example, *options)
    assert "trained in an earlier run" in done.stdout
    assert ": DISAGREE\n" in done.stdout and done.returncode == 1, done.stderr
    assert len(list(tmp_path.iterdir())) == 1


@in_full
def test_generate_refuses_bad_options():
    pytest.importorskip("transformers", minversion="5.17")
    done = run(ROOT / "examples" / "generate.py", "--tokens", "0")
    assert done.returncode == 2 and "--tokens must be at least 1" in done.stderr


@in_full
def test_quantize_experts():
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "quantize_experts.py"
    done = run(example, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^([a-z0-9-]+) +([\d.]+) +([\d.]+) +(\S+), +(\S+)$", done.stdout, re.M)
    assert [row[0] for row in rows] == [
        "fp8-tensor", "fp8-channel", "fp8-block", "int8-channel", "int8-block", "int8-weights", "int8-groups",
        "int4-groups", "int4-zero-points", "mxfp4",
    ]  # fmt: skip
    unquantised = float(re.search(r"^unquantised +\S+ +(\S+)$", done.stdout, re.M)[1])
    for name, milliseconds, size, from_unquantised, from_dequantised in rows:
        assert float(milliseconds) > 0
        assert unquantised / 9 < float(size) < unquantised / (6 if name[:4] in ("int4", "mxfp") else 3)
        assert 1e-3 < float(from_unquantised) < 0.5 and float(from_dequantised) < 0.3

    # It notices experts that are wrong.
    broken = BROKEN.replace("moe_ops.integrations.transformers as integration", "moe_ops as integration")
    done = run("-c", broken, example, "--device", "cpu", "--format", "int4-groups")
    assert "WRONG: more than roundings\n" in done.stdout and done.returncode == 1, done.stderr


@in_full
def test_quantize_experts_refuses_bad_options():
    pytest.importorskip("transformers", minversion="5.17")
    done = run(ROOT / "examples" / "quantize_experts.py", "--format", "int3")
    assert done.returncode == 2 and "invalid choice: 'int3'" in done.stderr


@in_full
def test_hf_generate():
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "hf_generate.py"
    done = run(example, "gpt_oss", "--device", "cpu", "--tokens", "5")
    assert done.returncode == 0, done.stderr
    eager, ours = (re.search(rf"^{name} .* tokens/s: (.*)$", done.stdout, re.M)[1] for name in ("eager", "moe_ops"))
    assert eager == ours and eager.count(",") == 4
    assert "(allowed: 1e-04); tokens: the same\n" in done.stdout

    done = run("-c", BROKEN, example, "gpt_oss", "--device", "cpu", "--tokens", "5")
    assert "logits differ by" in done.stdout and done.returncode == 1, done.stderr


@in_full
def test_serve_block():
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "serve_block.py"
    done = run(example, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(\d+) tokens/s \((.+)\); logits differ by (\S+), (.*)$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["eager", "grouped_mm", "batched_mm", "moe_ops"]
    assert [row[2] for row in rows] == ["not compiled", "compiled", "compiled", "compiled"]
    assert all(int(row[1]) > 0 and row[4] == "2 of 2 first tokens the same" for row in rows)
    assert done.stdout.endswith("logits: agree (allowed: 1e-04)\n")


@in_full
def test_serve_block_says_what_is_wrong():
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "serve_block.py"
    done = run("-c", BROKEN, example, "--device", "cpu")
    assert "logits: DISAGREE" in done.stdout and done.returncode == 1, done.stderr
    done = run(example, "--backend", "none")
    assert done.returncode == 2 and "--backend 'none' is none of torch.compile's" in done.stderr


@in_full
def test_hf_generate_says_why_not():
    pytest.importorskip("transformers", minversion="5.17")
    example = ROOT / "examples" / "hf_generate.py"
    done = run(example, "inkling2", "--device", "cpu", "--tokens", "2")
    assert done.returncode == 0 and "instead of the op: its gate transformers.models.inkling2" in done.stderr
    done = run(example, "bert")
    assert done.returncode == 2 and "'bert' is no family with transformers' experts interface" in done.stderr
    done = run(example, "qwen3_vl_moe")
    assert done.returncode == 1 and "qwen3_vl_moe has no model of text alone that generates" in done.stderr


def test_expert_parallel():
    example = ROOT / "examples" / "expert_parallel.py"
    done = run(example, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w+) +(\S+) experts on 2 x cpu: .* by (\S+) \(allowed: 1e-05\), ([\d,]+) tokens/s$",
                      done.stdout, re.M)  # fmt: skip
    assert [row[:2] for row in rows] == [("even", "3+3"), ("uneven", "4+2")]
    assert all(float(difference) < 1e-5 and int(speed.replace(",", "")) > 0 for _, _, difference, speed in rows)
    assert re.search(r"^24 tokens a rank go by (gather|alltoall): ", done.stdout, re.M)


@in_full
def test_expert_parallel_under_torchrun():
    example = ROOT / "examples" / "expert_parallel.py"
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", example, "--device", "cpu")
    assert done.returncode == 0 and "uneven" in done.stdout, done.stdout + done.stderr
