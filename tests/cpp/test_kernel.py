"""The C++ CPU kernel against the reference, by the rule that every path of the op is held to."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given

import moe_ops
from moe_ops.arguments import Arguments
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import (
    assert_correct,
    assert_exact,
    emulate,
    errors,
    exact_inputs,
    poisoned_memory,
    random_inputs,
)
from moe_ops.testing.strategies import assert_result, build, calls
from tests.cases import OPTIONS, SMALL, option_case
from tests.fuzz import drawing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("MOE_OPS_FUZZ_EXAMPLES", "40"))
# Checks an option case through the library in sys.argv[1].
CASES = """
import sys, torch
from tests.cases import OPTIONS, option_case
from moe_ops.testing import assert_correct
torch.ops.load_library(sys.argv[1])
def check(name, dtype):
    args = option_case(name, dtype)
    out = torch.ops.moe_ops_cpp.fused_moe_tma(**{key: getattr(args, key) for key in args.__slots__})
    assert_correct(out, args, round_up_projection=True)
"""
WITHOUT_PRODUCTS = """
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
for name in OPTIONS:
    check(name, torch.bfloat16)
    check(name, torch.float16)
print(len(OPTIONS))
"""


def values(args: Arguments) -> dict:
    return {name: getattr(args, name) for name in args.__slots__}


def small(**options) -> Arguments:
    return random_inputs(**{**SMALL, **options})


@pytest.fixture
def op(ops):
    """The op as a function of `Arguments`, in memory that is NaN until it is written."""

    def call(args: Arguments) -> torch.Tensor:
        with poisoned_memory():
            return ops.fused_moe_tma(**values(args))

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(op, name, dtype):
    args = option_case(name, dtype)
    assert_correct(op(args), args, round_up_projection=True)


def check_drawn(out: torch.Tensor, args: Arguments) -> None:
    if args.hidden_states.dtype == torch.float32 or not (fused_moe_reference(args) != 0).any():
        assert_result(out, args)
    else:
        assert_correct(out, args, round_up_projection=True)


def test_drawn_calls(op):
    """Sizes, options and layouts of every tensor: slices and offsets amid NaN, transposed, expanded."""

    @drawing(EXAMPLES * 3, 1, same_up_to=900)
    @given(calls(tma=False, dtypes=tuple(DTYPES), max_tokens=40))
    def holds(call):
        args = build(call)
        check_drawn(op(args), args)

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_exact(op, dtype, layout):
    args = exact_inputs(
        num_tokens=19, hidden=40, intermediate=24, experts=5, top_k=3, dtype=dtype, gate_up_layout=layout
    )
    assert_exact(op(args), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_one_product_takes(op, dtype):
    args = small(num_tokens=700, experts=2, top_k=2, routing="one_expert", dtype=dtype, bias=True)
    assert_correct(op(args), args, round_up_projection=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["its own", "float32"])
def test_down_output_is_rounded_once_after_its_bias(op, dtype, bias_dtype):
    args = small(dtype=dtype, bias=True, activation="relu2_no_gate", apply_router_weight_on_input=True)
    args.w2_bias = args.w2_bias.to(bias_dtype or dtype)
    got = assert_correct(op(args), args, round_up_projection=True)
    # A second rounding shows in a fifth more.
    assert got.rms < 1.05 * errors(emulate(args, round_up_projection=True), fused_moe_reference(args)).rms


@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_router_weights(op, weights_dtype):
    args = small()
    args.topk_weights = args.topk_weights.to(weights_dtype)
    assert_correct(op(args), args)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_expert_map_of_any_values(op, index_dtype):
    """Ids outside the map, and values of the map that are no expert here, drop the route, NaN weight and all."""
    args = small(index_dtype=index_dtype)
    args.expert_map = torch.tensor([3, -1, 0, 5, 1, 2, -(2**31), 2**31 - 1, 4], dtype=torch.int32)
    args.expert_map = torch.stack([args.expert_map, torch.zeros(9, dtype=torch.int32)], 1)[:, 0]
    args.topk_ids = torch.randint(-3, 12, args.topk_ids.shape).to(index_dtype)
    known = (args.topk_ids >= 0) & (args.topk_ids < 9)
    local = torch.where(known, args.expert_map[args.topk_ids.clamp(0, 8).long()], -1)
    dropped = (local < 0) | (local >= 5)
    args.topk_weights[dropped] = torch.nan
    assert dropped.any() and not dropped.all()
    assert_correct(op(args), args)
    args.reduce_topk = False
    assert (op(args)[dropped] == 0).all()


@pytest.mark.parametrize("bad", [-1, 5, 2**32 + 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("on_input", [False, True])
def test_all_dropped(op, bad, on_input):
    args = small(apply_router_weight_on_input=on_input)
    args.topk_ids = torch.full_like(args.topk_ids, bad, dtype=torch.int64)
    args.topk_weights.fill_(torch.nan)
    assert (op(args) == 0).all()
    args.expert_map = torch.empty(0, dtype=torch.int32)
    assert (op(args) == 0).all()


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_gate"])
def test_nan_rows_stay_where_they_are(op, activation):
    args = small(activation=activation, activation_limit=None if activation == "relu2_no_gate" else 2.0)
    expected = op(args)
    args.hidden_states[::4] = torch.nan
    out = op(args)
    clean = torch.arange(SMALL["num_tokens"]) % 4 != 0
    assert out[~clean].isnan().all()
    torch.testing.assert_close(out[clean], expected[clean])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce_topk", [True, False])
def test_no_tokens(op, dtype, reduce_topk):
    args = small(num_tokens=0, dtype=dtype, bias=True, reduce_topk=reduce_topk, out_dtype=torch.float16)
    out = op(args)
    assert out.shape == ((0, 72) if reduce_topk else (0, 3, 72)) and out.dtype == torch.float16


def test_path_reference_is_accepted(op):
    args = small(path="reference")
    assert_correct(op(args), args)


def test_inputs_that_require_grad_and_inference_mode(op):
    args = small(bias=True)
    expected = op(args)
    with torch.inference_mode():
        assert torch.equal(op(args), expected)
    for tensor in args.tensors().values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    assert torch.equal(op(args), expected)


def test_calls_at_the_same_time(op):
    args = [small(seed=seed, dtype=torch.bfloat16) for seed in range(4)]
    expected = [op(a) for a in args]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(op, args), expected))


def test_out_variant(ops):
    args = small(bias=True)
    expected = ops.fused_moe_tma(**values(args))
    buffer = torch.full((21, 2 * 72), 7.0)
    out = buffer[:, ::2]
    version = out._version
    assert ops.fused_moe_tma_(out, **values(args)) is None
    assert torch.equal(out, expected)
    assert (buffer[:, 1::2] == 7).all()
    assert out._version > version


def test_cpus_without_16_bit_products(built, run_python):
    """Weights are widened there. oneDNN takes the CPU for one of those if it is told to."""
    assert run_python(CASES + WITHOUT_PRODUCTS, built.beside, ONEDNN_MAX_CPU_ISA="AVX2") == str(len(OPTIONS))


def test_several_threads(built, run_python):
    code = (
        CASES
        + "torch.set_num_threads(3)\nfor name in OPTIONS: check(name, torch.float32)\nprint(torch.get_num_threads())"
    )
    assert run_python(code, built.beside) == "3"


# route.


@pytest.mark.parametrize("block", [1, 3, 16, 64])
@pytest.mark.parametrize("experts", [1, 2, 60])
@pytest.mark.parametrize("mapped", [False, True])
def test_route(ops, block, experts, mapped):
    ids = torch.randint(-2, experts + 2, (5, 29), generator=torch.Generator().manual_seed(0)).T
    ids[0, 0] = 2**32
    expert_map = torch.arange(experts, dtype=torch.int32).flip(0) - 1 if mapped else None
    got = ops.route(ids, experts, block, expert_map)
    expected = moe_ops.route(ids, experts, block, expert_map)
    assert all(map(torch.equal, got, expected))


def test_route_of_nothing(ops):
    got = ops.route(torch.empty(0, 3, dtype=torch.int64), 4, 16)
    assert [list(x.shape) for x in got] == [[0], [0], [1], [0]] and got[2].item() == 0
