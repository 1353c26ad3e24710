"""docs/troubleshooting.md quotes messages that there are, and leaves out no warning and no reason for a fallback."""

import ast
import re
from functools import cache

import pytest

from tests.checkout import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
# The first column of the tables, and messages in the text.
QUOTED = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
PLACE = "…"


def pieces(node: ast.AST) -> str:
    """A text of the source, with a sign in the place of what differs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else PLACE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pieces, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pieces(node.left) + pieces(node.right)
    return PLACE


@cache
def messages() -> list[str]:
    """Every text in the package."""
    found = []
    for file in (ROOT / "moe_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant) and len(text := pieces(node)) > 8:
                found.append(text)
    return found


def is_said(quote: str) -> bool:
    """Whether a text of the source has the fixed parts of a quote in their order, and what differs between them."""
    pattern = f"[^{PLACE}]*{PLACE}.*".join(map(re.escape, quote.strip(PLACE).split(PLACE)))
    return any(re.search(pattern, message, re.DOTALL) for message in messages())


@pytest.mark.parametrize("quote", QUOTED)
def test_quoted_messages_are_in_the_code(quote):
    assert is_said(quote)


def test_there_are_quotes():
    assert len(QUOTED) > 50
    assert not is_said("hidden_states has the wrong dtype …")
    assert not is_said("block_shape is None, and … needs it; pass the scales of …")


def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "moe_ops" / file).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def is_quoted(message: str) -> bool:
    fixed = [part for part in message.split(PLACE) if len(part) > 8]
    return any(all(part in quote for part in fixed) for quote in QUOTED)


def test_every_reason_for_a_fallback_has_its_row():
    found = functions("dispatch.py")
    reasons = [
        text
        for name in ("tma_obstacle", "_weight_obstacle")
        for node in ast.walk(found[name])
        if isinstance(node, ast.Return) and node.value is not None and len(text := pieces(node.value)) > 8
    ]
    assert len(reasons) >= 8
    assert [reason for reason in reasons if not is_quoted(reason)] == []


def test_every_warning_has_its_row():
    warnings = []
    for file in (ROOT / "moe_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = ast.unparse(node.func)
            logged = name.endswith(("LOGGER.warning", "LOGGER.info", "LOGGER.error")) or name == "_warn"
            if logged and len(text := pieces(node.args[0])) > 8:
                warnings.append(text)
    assert len(warnings) >= 4
    assert [warning for warning in warnings if not is_quoted(warning)] == []
