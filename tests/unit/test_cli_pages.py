"""The command line as one reads it: help that fits a terminal, sizes out of range, models as they are served."""

import pytest

from moe_ops.cli import main
from moe_ops.cli.models import COMMON, MODELS, find_sizes
from tests.unit.test_cli import error_of, output_of

COMMANDS = ("env", "explain", "doctor", "tune", "bench", "aot")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_page(capsys, monkeypatch, command):
    """Paragraphs are wrapped, examples are not, and no name is broken at a hyphen."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "examples:\n  python -m moe_ops " in text
    assert all(len(line) <= 98 for line in text.splitlines() if not line.startswith("  "))
    assert not [line for line in text.splitlines() if line.endswith("-")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--model", ""], "'' is neither a config.json nor one of"),
        (["explain", "--model", ":tp8"], "':tp8' is neither"),
        (["explain", "--model", "deepseek-v3:tp"], "'deepseek-v3:tp' is neither"),
        (["explain", "--model", "deepseek-v3:tp0"], "'deepseek-v3:tp0' is neither"),
        (["explain", "--model", "deepseek-v3:tp3"], "--model deepseek-v3:tp3: --tp 3 does not divide I = 2048"),
        (["explain", "--common", "--format", "int4"], "--common has no model that is served in --format int4"),
        (["explain", "--shape", "8,2,99999999999999999999,4"], "has a number above 16777216"),
        (["explain", "--model", "mixtral-8x7b", "--tokens", "1,99999999999999999999"], "above 0, 16777216 at most"),
        (["tune", "--model", "mixtral-8x7b", "--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written"),
        (["tune", "--model", "mixtral-8x7b", "--log", "/nowhere/log"], "--log /nowhere/log cannot be written"),
        (["aot", "--shapes", "mixtral-8x7b", "--out", "x", "--multiprocessors", "0"], "'0' is not a number above 0"),
    ],
)
def test_wrong_arguments(capsys, arguments, words):
    assert words in error_of(capsys, *arguments)


def test_ranks_behind_a_name():
    assert find_sizes("deepseek-v3:tp8") == ("deepseek-v3-tp8", (256, 8, 7168, 256))
    assert find_sizes("deepseek-ai/DeepSeek-V3:ep8") == ("deepseek-v3-ep8", (32, 1, 7168, 2048))
    assert find_sizes("qwen3-30b-a3b:tp2ep4") == ("qwen3-30b-a3b-tp2-ep4", (32, 2, 2048, 384))
    assert find_sizes("qwen3-30b-a3b", 2, 4) == find_sizes("qwen3-30b-a3b:tp2ep4")
    # What stands behind the name is meant, whatever else is said.
    assert find_sizes("qwen3-30b-a3b:tp4", 2, 4) == ("qwen3-30b-a3b-tp4", (128, 8, 2048, 192))


def test_ranks_behind_a_path(tmp_path):
    file = tmp_path / "checkpoint" / "config.json"
    file.parent.mkdir()
    file.write_text(
        '{"num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 64, "moe_intermediate_size": 32, "x": 1}'
    )
    assert find_sizes(f"{file}:ep2") == ("checkpoint-ep2", (8, 2, 64, 32))


def test_common_models_can_be_served(capsys):
    for deployment in COMMON:
        assert deployment.model in MODELS and deployment.formats
        name, sizes = find_sizes(deployment.name)
        assert sizes == MODELS[deployment.model].sizes(deployment.tp, deployment.ep) and name.startswith(
            deployment.model
        )
    assert len({find_sizes(deployment.name) for deployment in COMMON}) == len(COMMON)
    text = output_of(capsys, "explain", "--common", "--tokens", "64", "--device", "h100")
    assert text.count("bfloat16, on NVIDIA H100") == sum("none" in deployment.formats for deployment in COMMON)
    text = output_of(capsys, "explain", "--common", "--tokens", "64", "--device", "h100", "--format", "fp8_block")
    assert text.count("fp8_block, on NVIDIA H100") == sum("fp8_block" in deployment.formats for deployment in COMMON)
