"""CUDA graphs of the op: every path and variant, inputs and weights that change in place, pieces, shared pools."""

import pytest
import torch

import moe_ops
from moe_ops.arguments import Arguments
from moe_ops.testing import assert_correct, override, random_inputs
from tests.blocks import TransformerBlock, assert_block
from tests.cases import run
from tests.gpu.test_quantized import skip_unless_it_runs
from tests.quantized import FORMATS, quantized_case

OUT_OP = torch.ops.moe_ops.fused_moe_tma_.default
TOKENS = (1, 8, 64, 512, 4096)
SIZES = {"hidden": 512, "intermediate": 256, "experts": 16, "top_k": 4, "dtype": torch.bfloat16, "device": "cuda"}
# (format, path, variant)
RUNS = [
    *((None, path, variant) for path in ("classic", "tma") for variant in ("direct", "sorted")),
    (None, "tma", "pingpong"),
    ("fp8_channel", "tma", "pingpong"),
    ("fp8_block", "tma", "blockscaled"),
    ("int8_weights", "tma", "mixed"),
    ("mxfp4", "tma", "mixed"),
]


def make(name: str | None, num_tokens: int, **options) -> Arguments:
    """An unquantised call, or one of a format."""
    if name is None:
        return random_inputs(num_tokens=num_tokens, **{**SIZES, **options})
    return quantized_case(name, num_tokens=num_tokens, **{**SIZES, **options})


def capture(call, pool=None):
    """(a graph of a call that has run before, its result)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()
    return graph, out


def replace_in_place(args: Arguments, other: Arguments) -> None:
    """Gives a call the numbers of another one: inputs, weights and scales."""
    for name, tensor in args.tensors().items():
        tensor.copy_(getattr(other, name))


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(("name", "path", "variant"), RUNS)
def test_replays_with_other_inputs_and_weights(name, path, variant, num_tokens):
    args = make(name, num_tokens)
    skip_unless_it_runs(args, path, variant)
    with override(path=path, variant=variant):
        expected = run(args)
        graph, out = capture(lambda: run(args))
        graph.replay()
        assert torch.equal(out, expected)
        assert_correct(out, args)
        for seed, routing in enumerate(("one_expert", "hostile", "zipf", "sparse"), 1):
            other = make(name, num_tokens, seed=seed, routing=routing)
            replace_in_place(args, other)
            # A bigger call takes the memory that is free, and leaves something in it.
            run(make(name, 900))
            graph.replay()
            assert torch.equal(out, run(other))


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", FORMATS)
def test_format_replays_with_other_inputs_and_weights(name, num_tokens):
    args = quantized_case(name, torch.bfloat16, "cuda", num_tokens=num_tokens)
    other = quantized_case(name, torch.bfloat16, "cuda", num_tokens=num_tokens, seed=7)
    skip_unless_it_runs(args, "classic", "sorted")
    run(args)
    graph, out = capture(lambda: run(args))
    replace_in_place(args, other)
    graph.replay()
    assert torch.equal(out, run(other))


@pytest.mark.parametrize("name", [None, "fp8_block", "int4"])
def test_graphs_of_all_sizes_share_a_pool(name):
    """As a server captures them, the largest first: what one graph works in is another's too."""
    pool = torch.cuda.graph_pool_handle()
    largest = make(name, max(TOKENS))
    skip_unless_it_runs(largest, "classic", "sorted")
    graphs = {}
    for num_tokens in sorted(TOKENS, reverse=True):
        args = make(name, num_tokens)
        args.w1, args.w2, args.w1_scale, args.w2_scale = largest.w1, largest.w2, largest.w1_scale, largest.w2_scale
        run(args)
        graphs[num_tokens] = (args, *capture(lambda args=args: run(args), pool))
    for seed, num_tokens in enumerate((64, 4096, 1, 512, 8, 4096, 64), 1):
        args, graph, out = graphs[num_tokens]
        replace_in_place(args, make(name, num_tokens, seed=seed, routing="zipf"))
        graph.replay()
        assert torch.equal(out, run(args))


def test_a_pool_is_taken_by_graphs_of_the_op_and_of_others():
    """The op's workspaces lie where another graph's tensors were, and the other way round."""
    pool, args = torch.cuda.graph_pool_handle(), make(None, 512)
    x = torch.randn(2048, 2048, device="cuda")
    expected, product = run(args), (x @ x).relu() @ x
    graphs = [capture(call, pool) for call in (lambda: (x @ x).relu() @ x, lambda: run(args)) * 2]
    for index in (0, 1, 3, 2, 1, 0, 3):
        graphs[index][0].replay()
        torch.testing.assert_close(graphs[index][1], expected if index % 2 else product)


@pytest.mark.parametrize("op_is_a_piece", [True, False], ids=["captured", "eager"])
@torch.no_grad()
def test_pieces(op_is_a_piece):
    """As vLLM captures a model: the parts around the op apart, for each size, in one pool; the op is one, or eager."""
    block = TransformerBlock("cuda", torch.bfloat16, scale=8)
    other = TransformerBlock("cuda", torch.bfloat16, scale=8)
    for weight in other.parameters():
        weight.mul_(1.25)
    pool = torch.cuda.graph_pool_handle()
    buffer = torch.zeros(max(TOKENS), block.hidden, device="cuda", dtype=torch.bfloat16)
    pieces = {}
    for num_tokens in sorted(TOKENS, reverse=True):
        x = buffer[:num_tokens]
        block(x)
        first, (hidden, *given) = capture(lambda x=x: block.before(x), pool)
        if op_is_a_piece:
            middle, experts = capture(lambda given=given: block.op(*given), pool)
            run_op = middle.replay
        else:
            experts = torch.empty_like(x)

            def run_op(experts=experts, given=given):
                OUT_OP(experts, given[0], block.w1, block.w2, *given[1:])

        last, out = capture(lambda a=(hidden, given[0], experts): block.after(*a), pool)
        pieces[num_tokens] = first.replay, run_op, last.replay, (out, experts, *given)
    for seed, num_tokens in enumerate((64, 4096, 1, 512, 8, 1, 4096), 1):
        if seed == 4:  # a reload of weights
            for weight, new in zip(block.parameters(), other.parameters(), strict=True):
                weight.copy_(new)
        inputs = block.inputs(num_tokens, seed)
        buffer[:num_tokens].copy_(*inputs)
        *replays, results = pieces[num_tokens]
        for replay in replays:
            replay()
        assert_block(block, results, inputs)


@pytest.mark.parametrize("num_tokens", [8, 512])
def test_the_out_variant_and_route(num_tokens):
    args, other = make(None, num_tokens), make(None, num_tokens, seed=3, routing="hostile")
    buffer = torch.full_like(args.hidden_states, torch.nan)

    def call():
        OUT_OP(buffer, *args.tensors().values())
        return moe_ops.route(args.topk_ids, 16, 64)

    call()
    graph, routing = capture(call)
    replace_in_place(args, other)
    graph.replay()
    assert torch.equal(buffer, run(other))
    for got, expected in zip(routing, moe_ops.route(other.topk_ids, 16, 64), strict=True):
        assert torch.equal(got, expected)
