"""`python -m moe_ops`: its arguments, explain, and the models it knows, without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_ops.cli import explain, main
from moe_ops.cli.calls import SHAPES
from moe_ops.cli.formats import FORMATS
from moe_ops.cli.known import ARCHITECTURES, CARDS, known_card, like
from moe_ops.cli.limits import expected_work, work_of
from moe_ops.cli.models import MODELS, find_model
from moe_ops.cli.problems import describe_call
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.tuning import lookup
from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.table import Entry, Table, dump_table
from tests.command import error_of, output_of
from tests.unit.test_house import ROOT

COMMANDS = ("env", "explain", "doctor", "bench")
pytestmark = pytest.mark.usefixtures("without_a_gpu")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_page(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "examples:" in text and f"python -m moe_ops {command}" in text
    assert len(text.splitlines()) > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain"], "needs a --model, a --shape or --common"),
        (["explain", "--model", "gpt-9"], "--model gpt-9: 'gpt-9' is neither a config.json nor one of mixtral-8x7b"),
        (["explain", "--model", "deepseek-v3", "--tp", "3"], "--tp 3 does not divide I = 2048"),
        (["explain", "--model", "deepseek-v3", "--ep", "3"], "--ep 3 does not divide E = 256"),
        (["explain", "--shape", "8,2,64,64", "--tp", "2"], "--tp and --ep divide a --model"),
        (["explain", "--shape", "8,2,64"], "'8,2,64' is neither"),
        (["explain", "--model", "olmoe-1b-7b", "--tokens", "-1"], "'-1'"),
        (["explain", "--model", "olmoe-1b-7b", "--tp", "0"], "'0' is not a number above 0"),
        (["explain", "--model", "olmoe-1b-7b", "--device", "h900"], "--device 'h900' is not a device that is known"),
        (["explain", "--model", "olmoe-1b-7b", "--device", "a100", "--path", "tma"], "TMA needs 9.0"),
        (["explain", "--model", "olmoe-1b-7b", "--device", "a100", "--format", "fp8_block"], "fp8 needs 8.9"),
        (["explain", "--shape", "8,2,63,64", "--device", "h100", "--format", "int4"], "expected an even number"),
        (["env", "--colour"], "--colour"),
        (["doctor", "now"], "now"),
        (["bench", "--model", "gpt-9"], "--model gpt-9"),
        (["bench", "--compare", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["bench", "--csv", "/dev/null/out.csv"], "--csv /dev/null/out.csv"),
    ],
)
def test_wrong_arguments(capsys, arguments, words):
    if arguments[0] in ("env", "doctor"):  # found by the parser of all commands
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        captured = capsys.readouterr()
        assert exit.value.code == 2 and captured.err.count("\n") == 1 and words in captured.err
    else:
        assert words in error_of(capsys, *arguments)


def test_a_process_of_its_own():
    """Status and streams as a shell sees them; a table of plain text in a pipe."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "moe_ops", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True)

    good = run("explain", "--model", "gpt-oss-20b", "--device", "h200", "--tokens", "64")
    assert (good.returncode, good.stderr) == (0, "")
    lines = good.stdout.splitlines()
    assert lines[0].startswith("gpt-oss-20b (E=32, top_k=4") and lines[1].split()[0] == "M" and good.stdout.isascii()
    bad = run("explain", "--model", "nothing")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "chosen_shapes", interrupted)
    assert main(["explain", "--model", "olmoe-1b-7b"]) == 130
    assert capsys.readouterr().err == "python -m moe_ops explain: interrupted\n"


# Explain.


def test_explain_is_the_plan(capsys):
    arguments = ["--model", "qwen3-30b-a3b", "--tokens", "1,64,4096", "--device", "h200", "--json"]
    record = json.loads(output_of(capsys, "explain", *arguments))
    assert record["device"] == "NVIDIA H200" and [call["tokens"] for call in record["calls"]] == [1, 64, 4096]
    plan = make_plan(describe_call((128, 8, 2048, 768), 64, torch.bfloat16), known_card("h200").device)
    call = record["calls"][1]
    assert (call["path"], call["variant"], call["source"]) == ("tma", plan.variant, "heuristic")
    assert call["up"]["block_m"] == plan.block_m and call["workspace_bytes"] == plan.workspace_bytes
    # Nearly all experts are met, each with its weights: the bytes of a call.
    assert call["bound"] == "bytes" and call["least_ms"] == pytest.approx(126 * 3 * 2048 * 768 * 2 / 4800e6, rel=0.01)


@pytest.mark.parametrize("device", [*CARDS, *ARCHITECTURES, "cpu"])
def test_explain_on_every_device(capsys, device):
    text = output_of(capsys, "explain", "--model", "olmoe-1b-7b", "--device", device, "--tokens", "1,500")
    assert "olmoe-1b-7b (E=64, top_k=8, H=2048, I=1024), bfloat16, on " in text
    assert (" ms (bytes)" in text) == (device != "cpu")


@pytest.mark.parametrize("form", FORMATS)
def test_explain_every_format(capsys, form):
    text = output_of(capsys, "explain", "--shape", "8,2,512,256", "--device", "h100", "--format", form)
    assert f"bfloat16, {form}, on NVIDIA H100" in text


def test_explain_the_cpu_by_default(capsys):
    (call,) = json.loads(output_of(capsys, "explain", "--shape", "8,2,64,32", "--tokens", "4", "--json"))["calls"]
    assert (call["path"], call["up"], call["least_ms"], call["source"]) == ("cpu", None, None, "")


def test_explain_names_the_table(capsys, tmp_path, monkeypatch):
    bucket = Bucket(64, 2048, 1024, 8, "bfloat16", "none", "tma")
    device = known_card("h100").device
    tiles = lookup.heuristic_tiles(describe_call((64, 8, 2048, 1024), 64, torch.bfloat16), device, "tma")
    file = tmp_path / "sm_90" / bucket.file_name
    file.parent.mkdir()
    file.write_text(dump_table(Table(bucket, "any", (Entry(64, tiles),))))
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path))
    text = output_of(capsys, "explain", "--model", "olmoe-1b-7b", "--device", "h100", "--tokens", "16,64")
    assert f"table: {file}, tokens 64" in text and text.count("heuristic") == 1


def test_expected_work_is_that_of_an_even_call():
    from moe_ops.testing import random_inputs

    for tokens in (1, 3, 64):
        args = random_inputs(num_tokens=tokens, hidden=16, intermediate=8, experts=8, top_k=2, dtype=torch.bfloat16)
        expected, drawn = expected_work(make_problem(args)), work_of(args)
        assert expected.routes == drawn.routes and abs(expected.experts_met - drawn.experts_met) <= 2
        assert expected.up_weight_bytes / expected.experts_met == drawn.up_weight_bytes / drawn.experts_met
        assert (expected.up_flops, expected.down_flops) == (drawn.up_flops, drawn.down_flops)
        assert (expected.token_bytes, expected.act_bytes) == (drawn.token_bytes, drawn.act_bytes)


def test_devices_by_name():
    assert known_card("H200") == known_card("h-200") and known_card("sm90") == known_card("SM_90") == known_card("h100")
    assert like("NVIDIA H200 NVL") == CARDS["h200"] and like("NVIDIA H20-3e") == CARDS["h20"]
    assert like("NVIDIA GeForce RTX 4090 D") == CARDS["rtx4090"] and like("Radeon") is None


# Models.


def test_models_agree_with_the_shapes():
    assert MODELS["mixtral-8x7b"].sizes() == SHAPES["mixtral-8x7b"]
    assert MODELS["qwen3-30b-a3b"].sizes() == SHAPES["qwen3-30b-a3b"]
    assert MODELS["deepseek-v3"].sizes(tp=8) == SHAPES["deepseek-v3-tp8"]
    assert MODELS["deepseek-v3"].sizes(ep=8) == SHAPES["deepseek-v3-ep"]
    assert MODELS["gpt-oss-20b"].sizes() == SHAPES["gpt-oss-20b"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("zai-org/GLM-4.5-Air", "glm-4.5-air"),
        ("GLM-4.5", "glm-4.5"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
    ],
)
def test_model_names(text, name):
    assert find_model(text) == (name, MODELS[name])


CONFIGS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096, "intermediate_size": 14336},
    "qwen": {
        "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768,
        "intermediate_size": 6144,
    },
    "deepseek": {
        "n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168, "moe_intermediate_size": 2048,
        "intermediate_size": 18432,
    },
    "llama": {
        "text_config": {
            "num_local_experts": 16, "num_experts_per_tok": 1, "hidden_size": 5120, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("mixtral", (8, 2, 4096, 14336)),
        ("qwen", (128, 8, 2048, 768)),
        ("deepseek", (256, 8, 7168, 2048)),
        ("llama", (16, 1, 5120, 8192)),
    ],
)
def test_config_files(tmp_path, config, sizes):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": config, **CONFIGS[config]}))
    assert find_model(str(folder)) == find_model(str(folder / "config.json"))
    name, model = find_model(str(folder))
    assert name == "checkpoint" and model.sizes() == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": None}, "has none of n_routed_experts, num_local_experts, num_experts"),
        ({"hidden_size": "2048"}, "hidden_size is 2048, expected an integer"),
        ({"moe_intermediate_size": [768, 768]}, "moe_intermediate_size is [768, 768], expected"),
        ({"num_experts_per_tok": 129}, "sends a token to 129 of 128 experts"),
    ],
)
def test_config_files_of_other_models(capsys, tmp_path, change, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIGS["qwen"], **change}))
    assert words in error_of(capsys, "explain", "--model", str(file))
