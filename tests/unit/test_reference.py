"""The reference and the CPU path: the definition itself, then the rule of correctness over every option."""

import pytest
import torch
from torch.nn import functional

from moe_ops.reference import fused_moe_reference, local_experts
from moe_ops.testing import assert_correct, assert_exact, emulate, errors, exact_inputs, poisoned_memory, random_inputs
from tests.cases import OPTIONS, option_case, run


def test_definition_spelt_out():
    """One token, two routes, written without any of the library's code."""
    args = random_inputs(num_tokens=1, hidden=6, intermediate=4, experts=3, top_k=2, dtype=torch.float32)
    expected = torch.zeros(6, dtype=torch.float64)
    for k in range(2):
        expert = args.topk_ids[0, k].item()
        h = args.w1[expert].double() @ args.hidden_states[0].double()
        act = h[:4] / (1 + torch.exp(-h[:4])) * h[4:]
        expected += args.topk_weights[0, k].double() * (args.w2[expert].double() @ act)
    torch.testing.assert_close(fused_moe_reference(args)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "activation,options,expected",
    [
        ("silu", {}, lambda g, u: g * torch.sigmoid(g) * u),
        ("gelu", {}, lambda g, u: functional.gelu(g) * u),
        ("gelu_tanh", {}, lambda g, u: functional.gelu(g, approximate="tanh") * u),
        ("swigluoai", {}, lambda g, u: g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)),
        ("silu", {"activation_limit": 1.0}, lambda g, u: functional.silu(g.clamp(max=1)) * u.clamp(-1, 1)),
        ("silu_no_gate", {}, lambda g, u: functional.silu(g)),
        ("gelu_no_gate", {}, lambda g, u: functional.gelu(g)),
        ("relu2_no_gate", {}, lambda g, u: functional.relu(g) ** 2),
    ],
)
def test_activation(activation, options, expected):
    """With w2 one-hot and one route of weight 1 the op is the activation itself, on both sides of the clamps."""
    values = torch.linspace(-9, 9, 32)
    gated = not activation.endswith("_no_gate")
    gate, up = values[:, None], values.flip(0)[:, None] * 0.9
    args = random_inputs(num_tokens=1, hidden=1, intermediate=32, experts=1, top_k=1, activation=activation, **options)
    args.hidden_states, args.topk_weights = torch.ones(1, 1), torch.ones(1, 1)
    args.w1 = torch.cat([gate, up])[None] if gated else gate[None]
    for index in range(32):
        args.w2 = functional.one_hot(torch.tensor([[index]]), 32).float().view(1, 1, 32)
        want = expected(gate[index, 0].double(), up[index, 0].double())
        torch.testing.assert_close(fused_moe_reference(args)[0, 0], want, rtol=1e-6, atol=1e-6)
        # gelu cancels in float32: 1 + erf is exact to half an ulp of 1, and the up half multiplies that error too.
        atol = 1e-6 * max(1, abs(up[index, 0].item()) if gated else 1)
        torch.testing.assert_close(run(args)[0, 0].double(), want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu(name, dtype):
    args = option_case(name, dtype, hidden=136, intermediate=104)
    with poisoned_memory():
        out = run(args)
    assert_correct(out, args, round_up_projection=dtype != torch.float32)
    assert torch.equal(run(args), out)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_path(name):
    args = option_case(name, torch.float32)
    torch.testing.assert_close(run(args, path="reference").double(), fused_moe_reference(args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_exact_integers(dtype):
    args = exact_inputs(num_tokens=33, hidden=136, intermediate=72, experts=6, top_k=3, dtype=dtype)
    assert_exact(run(args), args)
    assert_exact(emulate(args), args)


def test_ids_are_checked_before_they_are_narrowed():
    ids = torch.tensor([2**32 + 1, 1, -1, 3, -(2**63), 2**63 - 1])
    assert local_experts(ids, 3).tolist() == [-1, 1, -1, -1, -1, -1]
    assert local_experts(ids, 3, torch.tensor([5, 2, -1, 0], dtype=torch.int32)).tolist() == [-1, 2, -1, 0, -1, -1]


# Wrong emulators: what a broken kernel would give. The rule has to tell each of them from the right one.
def _swap_gate_up(args):
    gate, up = args.w1.chunk(2, 1)
    args.w1 = torch.cat([up, gate], 1)


def _drop_last_column(args):
    args.w1 = args.w1.clone()
    args.w1[:, :, -1] = 0


def _drop_last_rows_of_down(args):
    args.w2 = args.w2.clone()
    args.w2[:, :, -1] = 0


def _shift_weights(args):
    args.topk_weights = args.topk_weights.roll(1, 0)


def _ignore_weights(args):
    args.topk_weights = torch.full_like(args.topk_weights, 1 / args.topk_weights.shape[1])


def _next_expert(args):
    args.topk_ids = (args.topk_ids + 1) % args.w1.shape[0]


def _drop_one_route(args):
    args.topk_ids = args.topk_ids.clone()
    args.topk_ids[0, 0] = -1


def _scale(args):
    args.routed_scaling_factor = 1.003


def _other_activation(args):
    args.activation = "gelu"


MUTANTS = [
    _swap_gate_up, _drop_last_column, _drop_last_rows_of_down, _shift_weights, _ignore_weights, _next_expert,
    _drop_one_route, _other_activation,
]  # fmt: skip


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rule_rejects(mutate, dtype):
    args = option_case("plain", dtype, hidden=136, intermediate=104)
    wrong = option_case("plain", dtype, hidden=136, intermediate=104)
    mutate(wrong)
    with pytest.raises(AssertionError, match="error"):
        assert_correct(emulate(wrong), args)


@pytest.mark.parametrize("mutate", [*MUTANTS[:-1], _scale], ids=lambda mutate: mutate.__name__)
def test_exact_integers_reject(mutate):
    sizes = {"num_tokens": 33, "hidden": 136, "intermediate": 72, "experts": 6, "top_k": 3, "dtype": torch.bfloat16}
    wrong = exact_inputs(**sizes)
    mutate(wrong)
    with pytest.raises(AssertionError, match="differ"):
        assert_exact(run(wrong, out_dtype=torch.float32), exact_inputs(**sizes))


def test_rule_is_not_blind():
    args = option_case("plain", torch.float32)
    with pytest.raises(AssertionError, match="error"):
        assert_correct(torch.zeros(21, 72), args)
    with pytest.raises(AssertionError, match="error"):
        assert_correct(torch.full((21, 72), float("nan")), args)
    with pytest.raises(AssertionError, match="blind"):
        errors(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="shape"):
        errors(torch.zeros(3), torch.ones(4))
    with pytest.raises(AssertionError, match="dtype"):
        assert_correct(emulate(args).double(), args)
