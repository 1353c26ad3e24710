"""torch.compile of a transformer block and of every format, on the CPU; tests/gpu/test_compile.py has the GPU's."""

import pytest
import torch

from moe_ops.arguments import Arguments
from tests.amount import in_full
from tests.blocks import Calls, TransformerBlock, assert_block, assert_calls, num_graphs, reset_compiler, used_arguments


@pytest.fixture(autouse=True)
def _reset():
    reset_compiler()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "context"),
    [
        pytest.param("default", torch.no_grad, marks=in_full),
        ("default", torch.enable_grad),
        ("reduce-overhead", torch.inference_mode),
        pytest.param("max-autotune", torch.no_grad, marks=in_full),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_modes(mode, context):
    block = TransformerBlock()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, mode=mode)
    for num_tokens in (64, 1, 4096, 7):
        with context():
            inputs = block.inputs(num_tokens)
            results = compiled(*inputs)
            assert_block(block, results, inputs)
            assert results[0].requires_grad == (context is torch.enable_grad)
    assert num_graphs() == 2


@pytest.mark.parametrize("dynamic", [None, True], ids=["found out", "said"])
@pytest.mark.parametrize(
    "order", [(1, 2, 4096, 3, 64), (4096, 1024, 1, 2, 33), (7, 1, 0, 8, 4096)], ids=["up", "down", "none between"]
)
def test_graphs_in_any_order(order, dynamic):
    """One for 1, one for the first number, one for all others: no more, unless there are no tokens at all."""
    block = TransformerBlock()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for num_tokens in (*order, *order):
            inputs = block.inputs(num_tokens)
            assert_block(block, compiled(*inputs), inputs)
    assert num_graphs() <= (3 if dynamic is None else 2) + (0 in order)


def test_no_graph_of_its_own_for_a_mode_of_autograd_seen_before():
    block = TransformerBlock()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for context in (torch.no_grad, torch.enable_grad, torch.no_grad, torch.enable_grad):
        with context():
            compiled(*block.inputs(7))
    assert num_graphs() == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_raises_and_names_the_cast(compiled):
    """Autocast makes the norm's and the projections' results 16-bit and leaves the experts' weights as they are."""
    block = TransformerBlock()
    call = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else block
    block.norms[1] = block.out
    cast = r"w1\.to\(torch\.bfloat16\) or hidden_states\.to\(torch\.float32\)"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match=cast) as error:
        call(*block.inputs(7))
    assert isinstance(error.value, TypeError) or compiled


def test_every_format():
    calls = Calls()
    compiled = torch.compile(calls, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for num_tokens in (7, 1, 64):
            inputs = calls.inputs(num_tokens)
            assert_calls(calls, compiled(*inputs), inputs)
    assert num_graphs() == 2


def test_calls_use_every_argument():
    assert used_arguments(Calls()) == set(Arguments.__slots__)
