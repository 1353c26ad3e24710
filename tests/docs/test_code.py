"""The code of the pages runs: a page's blocks one after the other, in one namespace and an empty folder.

A block that needs more than a CPU says so in its first line, `# needs a GPU`, and runs where there is one.
"""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_ops.quantization import FORMATS
from tests.checkout import ROOT
from tests.docs.pages import PAGES, Page

NEEDS: dict[str, Callable[[], bool]] = {
    "a GPU": torch.cuda.is_available,
    "two GPUs": lambda: torch.cuda.device_count() > 1,
    "torchrun": lambda: False,  # such code is that of an example, which has its own test
}
# Pages whose code another test runs, since it is not cheap.
ELSEWHERE = {"docs/compile.md": "tests/ops/test_aotinductor.py::test_the_page_of_docs"}
WITH_CODE = [page for page in PAGES if page.code("python")]


def need(block: str) -> str:
    """What a block says that it needs; "" for nothing."""
    match = re.match(r"# needs (.+)\n", block)
    return match[1] if match else ""


def tiny_checkpoint(folder: Path) -> str:
    """A small random model, saved: what the README loads."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


def check_readme(names: dict, printed: str) -> None:
    assert "path: cpu" in printed or "path='cpu'" in printed
    assert names["model"].config._experts_implementation == "moe_ops"
    assert names["out"].shape == (2, 5, 64)


def check_quantization(names: dict, printed: str) -> None:
    parts = [float(part) for part in re.findall(r": ([\d.]+)% from", printed)]
    assert len(parts) == 7 and all(0.1 < part < 25 for part in parts)
    assert "[[128, 128], [128, 4], [64, 4]]" in printed


def check_router(names: dict, printed: str) -> None:
    assert names["out"].shape == (6, 64)


def check_testing(names: dict, printed: str) -> None:
    assert len(printed.splitlines()) == 4


# Pages of which something is expected beside running.
CHECKS = {
    "README.md": check_readme,
    "docs/quantization.md": check_quantization,
    "docs/router.md": check_router,
    "docs/testing.md": check_testing,
}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.path))
def test_python_runs(page: Page, capsys, monkeypatch, tmp_path):
    if str(page.path) in ELSEWHERE:
        file, test = ELSEWHERE[str(page.path)].split("::")
        assert f"def {test}(" in (ROOT / file).read_text()
        pytest.skip(f"{ELSEWHERE[str(page.path)]} runs it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    if "README.md" in str(page.path):
        names["name"] = tiny_checkpoint(tmp_path / "checkpoint")
    with torch.random.fork_rng():
        for block in page.code("python"):
            if need(block) and not NEEDS[need(block)]():
                continue
            exec(compile(block, str(page.path), "exec"), names)
            if isinstance(out := names.get("out"), torch.Tensor):
                assert out.isfinite().all()
    if check := CHECKS.get(str(page.path)):
        check(names, capsys.readouterr().out)


def test_checks_are_those_of_pages():
    assert set(CHECKS) | set(ELSEWHERE) <= {str(page.path) for page in WITH_CODE}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.path))
def test_needs_are_known(page: Page):
    """A block may leave itself out of the tests only for a reason that a machine can lack."""
    for block in page.code("python"):
        ast.parse(block)
        assert need(block) in ("", *NEEDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path))
def test_fenced_code_names_its_language(page: Page):
    assert page.languages <= {"python", "json", "bibtex", "mermaid", "text"}
    for block in page.code("json"):
        json.loads(block)


def test_every_format_has_its_row():
    text = (ROOT / "docs" / "quantization.md").read_text()
    assert set(re.findall(r"^\| `(\w+_w\w+)` \|", text, re.MULTILINE)) == set(FORMATS[1:])
