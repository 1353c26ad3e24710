"""Tiny random models of the families of docs/models.md, through the op and without it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_ops.integrations import transformers as integration
from scripts import families
from tests.amount import in_full

pytestmark = pytest.mark.usefixtures("registered")

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ROWS = {
    row[0]: families.Verdict(*row)
    for row in re.findall(r"^\| `(\w+)` \| `(\w*)` \| ([\w ]+) \| (\w+) \| (.*) \|$", PAGE, re.M)
}
SAME_VERSION = f"with transformers {transformers.__version__}.\n" in PAGE
# Routers, gates, weight layouts and attentions of every kind.
QUICK = (
    *("afmoe", "aria", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v4", "dots1", "ernie4_5_moe", "gemma4"),
    *("glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "hy_v3", "jamba", "lfm2_moe", "minimax_m2"),
    *("minimax_m3_vl", "mixtral", "nemotron_h", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe"),
    *("qwen3_moe", "qwen3_next", "qwen3_vl_moe", "inkling2", "muse_spark"),
)
FALLBACKS = {"inkling2", "inkling2_loop", "muse_spark"}
# Attention, latent attention, sinks, a state space, a convolution, no gate.
GENERATE = ("deepseek_v2", "gpt_oss", "jamba", "lfm2_moe", "mixtral", "nemotron_h", "qwen3_moe")
INSTALLED = families.families()


def known(names):
    """Those that this version of transformers has."""
    return [name for name in names if name in INSTALLED]


def check(family, calls):
    verdict, model = families.verdict_of(family)
    assert verdict.result == ("fallback" if family in FALLBACKS else "fused"), verdict
    if SAME_VERSION:
        assert verdict == ROWS[family]
    calls.clear()
    got = families.outputs(model, "moe_ops")
    assert bool(calls) == (verdict.result == "fused")
    calls.clear()
    expected = families.outputs(model, "grouped_mm" if family in FALLBACKS else "eager")
    assert not calls
    assert families.difference(got, expected) <= 1e-4


@pytest.mark.parametrize("family", known(QUICK))
def test_family(family, calls):
    check(family, calls)


@in_full
@pytest.mark.parametrize("family", [name for name in INSTALLED if name not in QUICK])
def test_other_family(family, calls):
    if family not in ROWS:
        pytest.skip("newer than docs/models.md: run scripts/families.py")
    check(family, calls)


@pytest.mark.parametrize("family", known(GENERATE))
@torch.no_grad()
def test_generate(family, calls):
    _, model = families.verdict_of(family)
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    model.set_experts_implementation("moe_ops")
    calls.clear()
    written = model.generate(ids, **options)
    assert written.shape == (2, 15) and len(calls) % 8 == 0 and calls
    calls.clear()
    model.set_experts_implementation("eager")
    assert torch.equal(written, model.generate(ids, **options))
    assert not calls


def test_page_has_every_family():
    assert len(ROWS) >= 60
    assert {row.family for row in ROWS.values() if row.result == "fallback"} == FALLBACKS
    assert not [row for row in ROWS.values() if row.result == "not built"]
    if SAME_VERSION:
        assert sorted(ROWS) == INSTALLED
        assert families.page(list(ROWS.values())) == PAGE


@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_judge_finds_a_wrong_op(factor, monkeypatch):
    original = integration.fused_moe
    model = families.build(families.model_classes("mixtral")[0], "mixtral")
    monkeypatch.setattr(integration, "fused_moe", lambda *a, **kw: factor * original(*a, **kw))
    with pytest.raises(ArithmeticError, match="MixtralForCausalLM: the results differ by"):
        families.judge(model, "mixtral")


def test_judge_finds_an_op_that_is_not_called(monkeypatch):
    model = families.build(families.model_classes("mixtral")[0], "mixtral")
    monkeypatch.setattr(families.integration, "NAME", "eager")
    with pytest.raises(RuntimeError, match="0 calls of the op for 2 of experts modules"):
        families.judge(model, "mixtral")


def test_verdict_of_what_cannot_be_built(monkeypatch):
    def build(cls, family):
        raise ValueError("too\n  large")

    monkeypatch.setattr(families, "build", build)
    verdict, model = families.verdict_of("mixtral")
    assert model is None
    assert dataclasses.astuple(verdict) == (
        "mixtral",
        "MixtralForCausalLM",
        "not built",
        "own",
        "ValueError: too large",
    )
