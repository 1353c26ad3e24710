"""The CPU backend at its edges, and drawn calls. The general numeric tests are elsewhere."""

import os

import pytest
import torch
from hypothesis import given

import moe_ops  # noqa: F401  (registers the op)
from moe_ops.backends import cpu
from moe_ops.problem import Arguments
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import assert_correct, emulate, errors, poisoned_memory
from moe_ops.testing.strategies import assert_result, build, calls
from tests.cases import option_case, run
from tests.fuzz import drawing

EXAMPLES = int(os.environ.get("MOE_OPS_FUZZ_EXAMPLES", "60"))
H, I = 64, 48  # noqa: E741
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to 1 + |expected|: three roundings in 16 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(num_tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(num_tokens, H).to(dtype),
        (torch.randn(experts, 2 * I, H) / H**0.5).to(dtype),
        (torch.randn(experts, H, I) / I**0.5).to(dtype),
        torch.rand(num_tokens, top_k),
        torch.randint(0, experts, (num_tokens, top_k)),
    ]


def check(inputs: list[torch.Tensor], **options) -> torch.Tensor:
    out = torch.ops.moe_ops.fused_moe_tma(*inputs, **options)
    expected = fused_moe_reference(Arguments(*inputs, **options))
    assert out.shape == expected.shape
    error = (out.double() - expected).abs() / (1 + expected.abs())
    assert (error <= TOLERANCE[inputs[0].dtype]).all(), error.max()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "experts", "top_k"),
    [(1, 8, 4), (9, 8, 2), (300, 4, 2), (700, 2, 1), (40, 1, 1), (5, 2, 6), (3, 64, 2)],
    ids=["one token", "few rows", "many rows", "rows past a chunk", "one expert", "top_k > E", "empty experts"],
)
def test_sizes(num_tokens, experts, top_k, dtype):
    check(make(num_tokens, experts, top_k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    assert check(make(0, 4, 2, dtype)).shape == (0, H)
    assert check(make(0, 4, 2, dtype), reduce_topk=False).shape == (0, 2, H)


@pytest.mark.parametrize("bad_id", [-1, 4, 2**32 + 1, -(2**63)])
@pytest.mark.parametrize("on_input", [False, True])
def test_nan_weight_of_a_dropped_slot(bad_id, on_input):
    inputs = make(20, 4, 2, torch.bfloat16)
    inputs[4][::3, 1] = bad_id
    inputs[3][::3, 1] = float("nan")
    check(inputs, apply_router_weight_on_input=on_input)
    routes = check(inputs, apply_router_weight_on_input=on_input, reduce_topk=False)
    assert (routes[::3, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dropped(dtype):
    inputs = make(6, 4, 2, dtype)
    inputs[4].fill_(-1)
    assert (check(inputs) == 0).all()


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_rows_stay_where_they_are(num_tokens, dtype):
    inputs = make(num_tokens, 4, 2, dtype)
    inputs[4][1] = -1
    expected = torch.ops.moe_ops.fused_moe_tma(*inputs)
    inputs[0][::4] = float("nan")
    out = torch.ops.moe_ops.fused_moe_tma(*inputs)
    clean = torch.arange(num_tokens) % 4 != 0
    assert out[~clean].isnan().all()
    assert torch.equal(out[clean], expected[clean])


def test_strided_out():
    inputs = make(20, 4, 2, torch.float32)
    out = torch.full((20, 2 * H), 7.0)
    torch.ops.moe_ops.fused_moe_tma_(out[:, ::2], *inputs)
    assert torch.equal(out[:, ::2], torch.ops.moe_ops.fused_moe_tma(*inputs))
    assert (out[:, 1::2] == 7).all()


@pytest.mark.parametrize("has_product", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_to_multiply(dtype, threads, has_product, monkeypatch):
    """Native and widened products, in one piece and in column blocks, whatever this CPU would choose."""
    monkeypatch.setattr(cpu, "_has_product", lambda dtype: has_product)
    monkeypatch.setattr(cpu, "_COLUMNS_TO_SPLIT", 1)
    monkeypatch.setattr(cpu, "_WEIGHTS_TO_SPLIT", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = make(40, 4, 2, dtype)
    check(inputs, w1_bias=torch.randn(4, 2 * I).to(dtype), w2_bias=torch.randn(4, H).to(dtype))
    check(inputs)
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)  # N-major
    inputs[2] = torch.stack([inputs[2], torch.full_like(inputs[2], float("nan"))], -1)[..., 0]  # no stride of 1
    check(inputs)


@pytest.mark.parametrize("num_tokens", [1, 21])
@pytest.mark.parametrize("has_product", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["its own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_down_output_is_rounded_once_after_its_bias(dtype, bias_dtype, has_product, num_tokens, monkeypatch):
    monkeypatch.setattr(cpu, "_has_product", lambda dtype: has_product)
    sizes = {"num_tokens": num_tokens, "hidden": 256, "activation": "relu2_no_gate"}
    args = option_case("router_weight_on_input", dtype, **sizes)
    args.w2_bias = args.w2_bias.to(bias_dtype or dtype)
    got = assert_correct(run(args), args, round_up_projection=True)
    # A second rounding shows in a fifth more.
    assert got.rms < 1.05 * errors(emulate(args, round_up_projection=True), fused_moe_reference(args)).rms


def test_drawn_calls():
    """Sizes, options and layouts of every tensor; a failure prints a call that `build` makes again."""

    @drawing(EXAMPLES * 3, 1, same_up_to=900)
    @given(calls(tma=False, dtypes=tuple(DTYPES), max_tokens=40))
    def holds(call):
        args = build(call)
        with poisoned_memory():
            out = run(args)
        if args.hidden_states.dtype == torch.float32 or not (fused_moe_reference(args) != 0).any():
            assert_result(out, args)
        else:
            assert_correct(out, args, round_up_projection=True)

    holds()
