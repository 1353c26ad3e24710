"""The Triton paths end to end on the CPU. bfloat16 is for the GPU: the interpreter multiplies its bit patterns."""

import itertools

import pytest
import torch

from moe_ops.reference import fused_moe_reference
from moe_ops.testing import assert_correct, assert_exact, exact_inputs, override, poisoned_memory, random_inputs
from moe_ops.tuning import TileConfig
from tests.amount import ALL, params
from tests.cases import OPTIONS, option_case, run

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
PATHS = pytest.mark.parametrize("path", ["classic", "tma"])
# Without a sort: the heuristic's tiles are for a GPU, and the interpreter's time goes by the number of programs.
WIDE = TileConfig(1, 64, 128)


# Of what a dtype takes part in: rounding, tails, biases, weights of routes, the result's own dtype.
IN_FLOAT32 = (
    "plain", "tails_in_both_dimensions", "hostile_ids_int32", "biases_interleaved", "n_major", "router_weight_on_input",
    "routes_unsummed", "out_float32", "gelu", "swigluoai", "relu2_no_gate",
)  # fmt: skip
RUNS = list(itertools.product(["classic", "tma"], [torch.float16, torch.float32], OPTIONS))


@pytest.mark.parametrize(
    ("path", "dtype", "name"),
    # float32 takes path tma in the interpreter alone.
    params(RUNS, [*(run for run in RUNS if run[1] == torch.float16),
                  *(("classic", torch.float32, name) for name in IN_FLOAT32)]),
    ids=str,
)  # fmt: skip
def test_option(name, path, dtype):
    args = option_case(name, dtype)
    with poisoned_memory():
        out = run(args, path=path)
    assert_correct(out, args)


@pytest.mark.parametrize("name", OPTIONS)
@PATHS
def test_option_without_a_sort(name, path):
    args = option_case(name, torch.float16, num_tokens=3)
    config = None if ALL or name == "plain" else WIDE
    with override(path=path, variant="direct", config=config), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


@PATHS
@DTYPES
def test_exact_integers(path, dtype):
    args = exact_inputs(num_tokens=19, hidden=72, intermediate=40, experts=5, top_k=3, dtype=dtype)
    assert_exact(run(args, path=path), args)


@pytest.mark.parametrize(
    "config",
    [
        TileConfig(16, 16, 16),
        TileConfig(32, 64, 32),
        TileConfig(64, 32, 64, group_m=1),
        TileConfig(16, 32, 64, swap_ab=True),
        TileConfig(64, 64, 32, swap_ab=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@PATHS
def test_tile_sizes(config, layout, path):
    args = random_inputs(
        num_tokens=50, hidden=88, intermediate=56, experts=4, top_k=2, dtype=torch.float16, gate_up_layout=layout
    )
    with override(path=path, config=config), poisoned_memory():
        assert_correct(run(args), args)


@pytest.mark.parametrize("sizes", [(511, 40), (40, 31), (2, 1), (1, 3)], ids=str)
def test_odd_sizes_go_classic(sizes):
    hidden, intermediate = sizes
    args = random_inputs(num_tokens=7, hidden=hidden, intermediate=intermediate, experts=3, top_k=2)
    with poisoned_memory():
        assert_correct(run(args, path="classic"), args)
    with pytest.raises(ValueError, match="multiple of 16"):
        run(args, path="tma")


def _sliced(tensor):
    """The same values inside a wider buffer of NaN: row stride and start differ from a contiguous tensor's."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 24), float("nan"), dtype=tensor.dtype)
    view = wider[..., 8:-16]
    view.copy_(tensor)
    return view


@PATHS
def test_strided_operands(path):
    args = option_case("biases", torch.float16)
    expected = run(args, path=path)
    for name in ("hidden_states", "w1", "w2", "topk_weights", "w1_bias", "w2_bias"):
        setattr(args, name, _sliced(getattr(args, name)))
    args.topk_ids = args.topk_ids.t().contiguous().t()
    assert torch.equal(run(args, path=path), expected)


def test_hidden_states_column_major_and_expanded():
    args = option_case("plain", torch.float16)
    expected = run(args, path="classic")
    args.hidden_states = args.hidden_states.t().contiguous().t()
    assert torch.equal(run(args, path="classic"), expected)
    args.hidden_states = args.hidden_states[:1].expand(21, -1)
    assert_correct(run(args, path="tma"), args)


@PATHS
def test_out_variant_writes_a_strided_buffer_and_nothing_else(path):
    args = option_case("hostile_ids_int32", torch.float16)
    wider = torch.full((21, 100), 7.0, dtype=torch.float16)
    out = wider[:, 10:82]
    torch.ops.moe_ops.fused_moe_tma_(out, **{name: getattr(args, name) for name in args.__slots__} | {"path": path})
    assert torch.equal(out, run(args, path=path))
    assert (wider[:, :10] == 7).all() and (wider[:, 82:] == 7).all()


@PATHS
@pytest.mark.parametrize("variant", ["direct", "sorted"])
def test_summands_far_apart_in_the_result(path, variant):
    """The third summand starts 2^31 elements behind the first; the system backs only the pages that are written."""
    args = option_case("plain", torch.float16, num_tokens=2, reduce_topk=False)
    tokens, slots, hidden = 2, 3, 72
    out = torch.empty(2**31 + 2**10, dtype=torch.float16).as_strided((tokens, slots, hidden), (hidden, 2**30, 1))
    config = WIDE if variant == "direct" and not ALL else None
    with override(path=path, variant=variant, config=config):
        torch.ops.moe_ops.fused_moe_tma_(out, **{name: getattr(args, name) for name in args.__slots__})
        assert torch.equal(out, run(args))


@PATHS
@pytest.mark.parametrize("mapped", [[2, -1, 0, 7, 1], [-1, -1, -1, -1, -1], []], ids=str)
def test_expert_map(path, mapped):
    args = random_inputs(num_tokens=13, hidden=40, intermediate=24, experts=3, top_k=2, dtype=torch.float16)
    args.topk_ids = torch.randint(-1, 6, (13, 2), generator=torch.Generator().manual_seed(1))
    args.expert_map = torch.tensor(mapped, dtype=torch.int32)
    out = run(args, path=path)
    if any(0 <= local < 3 for local in mapped):
        assert_correct(out, args)
    else:
        assert (fused_moe_reference(args) == 0).all() and (out == 0).all()


@PATHS
@pytest.mark.parametrize("variant", ["direct", "sorted"])
def test_strided_expert_map(path, variant):
    args = random_inputs(num_tokens=5, hidden=40, intermediate=24, experts=3, top_k=2, dtype=torch.float16)
    args.expert_map = torch.tensor([[2, 7], [0, -1], [1, 99]], dtype=torch.int32)[:, 0]
    with override(path=path, variant=variant):
        assert_correct(run(args), args)


@PATHS
def test_nan_stays_with_the_tokens_it_reaches(path):
    args = option_case("plain", torch.float16)
    clean = run(args, path=path)
    args.hidden_states = args.hidden_states.clone()
    args.hidden_states[4] = float("nan")
    args.hidden_states[9] = float("inf")
    out = run(args, path=path)
    rest = [m for m in range(21) if m not in (4, 9)]
    assert torch.equal(out[rest], clean[rest])
    assert not out[[4, 9]].isfinite().any()
    args.w1 = args.w1.clone()
    args.w1[2] = float("nan")
    out = run(args, path=path)
    reached = (args.topk_ids == 2).any(1)
    spared = [m for m in rest if not reached[m]]
    assert len(spared) > 0
    assert torch.equal(out[spared], clean[spared])


@PATHS
def test_no_route_at_all_is_zero(path):
    args = option_case("plain", torch.float16)
    args.topk_ids = torch.full_like(args.topk_ids, -1)
    args.topk_weights = torch.full_like(args.topk_weights, float("nan"))
    with poisoned_memory():
        assert (run(args, path=path) == 0).all()


def test_batch_invariance(monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    args = random_inputs(num_tokens=70, hidden=64, intermediate=32, experts=2, top_k=2, dtype=torch.float16)
    full = run(args, path="tma")
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        setattr(args, name, getattr(args, name)[:1])
    assert torch.equal(run(args, path="tma"), full[:1])
