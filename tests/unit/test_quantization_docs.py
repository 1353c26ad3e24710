"""The code of docs/quantization.md runs, and its table of formats has all of them."""

import re
from pathlib import Path

import torch

from moe_ops.quantization import FORMATS

TEXT = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()


def test_examples(capsys):
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
        if "out" in names:
            assert names.pop("out").isfinite().all()
    printed = capsys.readouterr().out
    parts = [float(part) for part in re.findall(r": ([\d.]+)% from", printed)]
    assert len(parts) == 7 and all(0.1 < part < 25 for part in parts)
    assert "[[128, 128], [128, 4], [64, 4]]" in printed


def test_table_has_every_format():
    assert set(re.findall(r"^\| `(\w+_w\w+)` \|", TEXT, re.MULTILINE)) == set(FORMATS[1:])
