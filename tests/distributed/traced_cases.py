"""What each rank runs under torch.compile and in CUDA graphs."""

import torch

from moe_ops.distributed import ExpertParallel
from moe_ops.nn import MoELayer
from tests.distributed.calls import Cases, draw, hold, of_experts, of_rank

CASES = Cases()


def _traced(me, backend):
    for options in (
        {"way": "gather", "max_tokens": 8},
        {"way": "alltoall", "max_tokens": 8},
        {"max_tokens": 8},
        {"way": "alltoall", "max_tokens": 8, "capacity": 7, "on_overflow": "error"},
        {"way": "gather", "max_tokens": 8, "combine_dtype": torch.float16},
    ):
        torch.compiler.reset()
        dtype = torch.bfloat16 if "combine_dtype" in options else torch.float32
        mine = of_rank(draw(me, [6] * me.size, dtype=dtype), [6] * me.size, me.rank)
        ep = ExpertParallel(None, 5, **options)
        positional, named = of_experts(mine, ep.local_experts)
        with torch.no_grad():
            compiled = torch.compile(lambda x: ep.fused_moe(x, *positional[1:], **named) * 2,  # noqa: B023
                                     fullgraph=True, backend=backend)  # fmt: skip
            out = compiled(mine.hidden_states)
        hold(out / 2, mine)
    ep = ExpertParallel(None, 5)
    try:
        torch.compile(lambda x: ep.fused_moe(x, *positional[1:], **named), fullgraph=True, backend=backend)(
            mine.hidden_states
        )
    except Exception as error:
        assert "pass max_tokens" in str(error), error
    else:
        raise AssertionError("no error")


@CASES
def graphs(me):
    """In a CUDA graph, with other tokens at every replay, some of which find no room; and what none can hold."""
    counts = [7] * me.size
    for options in (
        {"way": "gather", "max_tokens": 8},
        {"way": "gather", "max_tokens": 8, "combine_dtype": torch.float16},
        {"way": "alltoall", "max_tokens": 8},
        {"way": "alltoall", "max_tokens": 8, "capacity": 6, "on_overflow": "error", "combine_dtype": torch.float16},
    ):
        calls = []
        for seed in range(4):
            mine = of_rank(draw(me, counts, dtype=torch.bfloat16, seed=seed, top_k=1), counts, me.rank)
            # In the last one all tokens go to one rank.
            mine.topk_ids[:, 0] = (torch.arange(7, device=me.device) + seed) % 5 if seed < 3 else 0
            calls.append(mine)
        ep = ExpertParallel(None, 5, **options)
        (x, w1, w2, topk_weights, topk_ids), named = of_experts(calls[0], ep.local_experts)
        x, topk_weights, topk_ids = (tensor.clone() for tensor in (x, topk_weights, topk_ids))
        weights = w1.clone(), w2.clone()

        def run_it(tensors=(x, *weights, topk_weights, topk_ids), ep=ep, named=named):
            return ep.fused_moe(*tensors, **named)

        run_it()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run_it()
        for seed, mine in enumerate(calls):
            x.copy_(mine.hidden_states)
            topk_weights.copy_(mine.topk_weights)
            topk_ids.copy_(mine.topk_ids)
            (_, w1, w2, *_), _ = of_experts(mine, ep.local_experts)
            for kept, other in zip(weights, (w1, w2), strict=True):
                kept.copy_(other)
            graph.replay()
            if seed == 3 and "capacity" in options:
                assert out[6:].isnan().all() and not out[:6].isnan().any()
            else:
                hold(out, mine)
        assert bool(ep.overflow.item()) == ("capacity" in options)
    ep = ExpertParallel(None, 5)
    run_it(ep=ep)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            run_it(ep=ep)
    except ValueError as error:
        assert "pass max_tokens" in str(error)
    else:
        raise AssertionError("no error")


@CASES
def traced(me):
    _traced(me, "aot_eager")


@CASES
def compiled(me):
    _traced(me, "inductor")


@CASES
def compiled_layer(me):
    """Of any M."""
    torch.manual_seed(0)
    ep = ExpertParallel(None, 5, max_tokens=16, way="gather")
    layer = MoELayer(48, 32, num_experts=5, top_k=2, ep_group=ep, device=me.device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="inductor")
    with torch.no_grad():
        for tokens in (5, 7, 16):
            x = torch.randn(tokens, 48, device=me.device)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
