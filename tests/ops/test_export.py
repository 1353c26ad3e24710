"""torch.export with any number of tokens: saved, loaded in a fresh process, run there."""

import pytest
import torch

from tests.amount import in_full
from tests.blocks import Calls, TransformerBlock, assert_block, assert_calls, dynamic_tokens
from tests.ops.saved import run_saved

TOKENS = (0, 1, 2, 6, 31, 4096)


def ops(program: torch.export.ExportedProgram) -> int:
    """How often the graph calls the op."""
    return sum(node.target is torch.ops.moe_ops.fused_moe_tma.default for node in program.graph.nodes)


BLOCK = TransformerBlock, assert_block, TOKENS
EVERY_ARGUMENT = Calls, assert_calls, TOKENS[:-1]


@pytest.mark.parametrize(
    ("make", "check", "tokens", "strict"),
    [
        pytest.param(*BLOCK, False, id="block-nonstrict"),
        pytest.param(*EVERY_ARGUMENT, True, id="every-argument-strict"),
        pytest.param(*BLOCK, True, id="block-strict", marks=in_full),
        pytest.param(*EVERY_ARGUMENT, False, id="every-argument-nonstrict", marks=in_full),
    ],
)
def test_export(make, check, tokens, strict, tmp_path):
    torch._dynamo.reset()
    module = make()
    example = module.inputs(6)
    # Grad mode, and weights that are Parameters: an export does not ask for torch.no_grad().
    program = torch.export.export(module, example, dynamic_shapes=dynamic_tokens(example), strict=strict)
    assert ops(program) == (1 if make is TransformerBlock else len(module.options))
    torch.export.save(program, tmp_path / "program.pt2")
    inputs = [module.inputs(num_tokens) for num_tokens in tokens]
    for given, results in zip(inputs, run_saved("export", tmp_path / "program.pt2", inputs), strict=True):
        with torch.no_grad():
            check(module, results, given)
