"""A package of AOTInductor with the op in it, loaded and run from Python; and docs/compile.md, which has one too."""

import re
from pathlib import Path

import torch

from tests.amount import in_full
from tests.blocks import Calls, TransformerBlock, assert_block, assert_calls, dynamic_tokens
from tests.ops.saved import run_saved


class Both(torch.nn.Module):
    """One package instead of two: most of the time goes to the C++ compiler."""

    def __init__(self):
        super().__init__()
        self.block, self.calls = TransformerBlock(), Calls()

    def forward(self, x, calls):
        return self.block(x), self.calls(calls)

    def inputs(self, num_tokens: int) -> tuple:
        return *self.block.inputs(num_tokens), *self.calls.inputs(num_tokens)


@in_full
def test_package(tmp_path):
    module = Both()
    example = module.inputs(6)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic_tokens(example))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    assert path == str(tmp_path / "package.pt2")
    inputs = [module.inputs(num_tokens) for num_tokens in (1, 2, 31)]
    with torch.no_grad():
        for given, (block, calls) in zip(inputs, run_saved("aoti", tmp_path / "package.pt2", inputs), strict=True):
            assert_block(module.block, block, given[:1])
            assert_calls(module.calls, calls, given[1:], packaged=True)


@in_full
def test_the_page_of_docs(tmp_path, monkeypatch, capsys):
    """Here, and not in a file of its own: a process that has packaged once has its C++ compiler looked over."""
    text = (Path(__file__).parents[2] / "docs" / "compile.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.splitlines()[-2:] == 2 * ["torch.Size([31, 64])"]
