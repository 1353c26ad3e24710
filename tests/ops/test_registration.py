"""The ops as PyTorch sees them: fakes, autograd, one op under torch.compile, the out-variant. All on the CPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops import registration
from moe_ops.arguments import TENSOR_ARGUMENTS, Arguments
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import random_inputs

OP = torch.ops.moe_ops.fused_moe_tma.default
OUT_OP = torch.ops.moe_ops.fused_moe_tma_.default
ROUTE_OP = torch.ops.moe_ops.route.default
# Sizes that differ from each other and from the numbers of tokens below: torch.compile takes sizes that are equal when
# it traces for one and the same, and compiles again when they part.
SIZES = {"hidden": 24, "intermediate": 16, "experts": 4, "top_k": 3}
NO_BACKWARD = r"no backward.*torch\.no_grad\(\)"


def inputs(num_tokens: int, *, hidden_layout: str = "contiguous", **options) -> Arguments:
    """A call whose hidden states are contiguous, a slice of wider rows, or a transposed view."""
    args = random_inputs(num_tokens=num_tokens, **{**SIZES, **options})
    x = args.hidden_states
    if hidden_layout == "sliced":
        args.hidden_states = torch.cat([x, x], 1)[:, : x.shape[1]]
    elif hidden_layout == "transposed":
        args.hidden_states = x.T.contiguous().T
    return args


def split(args: Arguments) -> tuple[tuple, dict]:
    """The positional and the keyword-only arguments."""
    tensors = tuple(getattr(args, name) for name in TENSOR_ARGUMENTS)
    return tensors, {name: getattr(args, name) for name in args.__slots__ if name not in TENSOR_ARGUMENTS}


EXPERT_MAP = torch.tensor([2, -1, 0, 3, 1], dtype=torch.int32)
CASES = {
    "one-token": {"num_tokens": 1, "dtype": torch.bfloat16},
    "no-tokens": {"num_tokens": 0, "bias": True},
    "no-tokens-unsummed": {"num_tokens": 0, "reduce_topk": False, "n_major": True},
    "sliced-n-major-int64": {
        "num_tokens": 5,
        "hidden_layout": "sliced",
        "n_major": True,
        "routing": "hostile",
        "index_dtype": torch.int64,
        "activation_limit": 0.5,
        "routed_scaling_factor": 2.5,
        "deterministic": False,
        "out_dtype": torch.float16,
    },
    "transposed-swigluoai-unsummed": {
        "num_tokens": 5,
        "hidden_layout": "transposed",
        "dtype": torch.float16,
        "bias": True,
        "activation": "swigluoai",
        "activation_alpha": 1.1,
        "activation_limit": 2.0,
        "gate_up_layout": "interleaved",
        "apply_router_weight_on_input": True,
        "reduce_topk": False,
        "expert_map": EXPERT_MAP,
    },
    "no-gate-reference": {
        "num_tokens": 5,
        "activation": "relu2_no_gate",
        "quantization": "none",
        "path": "reference",
        "out_dtype": torch.bfloat16,
    },
}


def test_cases_use_every_option():
    """Scales, zero points and blocks belong to quantised weights, which this version refuses."""
    used = set()
    for case in CASES.values():
        args = inputs(**case)
        used |= set(args.tensors()) | set(case)
    quantised = {name for name in args.__slots__ if "scale" in name or "zero_point" in name} - {"routed_scaling_factor"}
    assert set(args.__slots__) - quantised - {"block_shape"} <= used


def out_for(args: Arguments) -> torch.Tensor:
    """A NaN-filled buffer for the call's result."""
    result = moe_ops.fused_moe(*split(args)[0], **split(args)[1])
    return torch.full_like(result, torch.nan)


# Registration.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck(case):
    tensors, options = split(inputs(**case))
    opcheck(OP, tensors, options)


@pytest.mark.parametrize("name", ["one-token", "no-tokens", "transposed-swigluoai-unsummed"])
def test_opcheck_out(name):
    args = inputs(**CASES[name])
    tensors, options = split(args)
    opcheck(OUT_OP, (out_for(args), *tensors), options)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("expert_map", [None, EXPERT_MAP], ids=["", "map"])
def test_opcheck_route(num_tokens, expert_map):
    ids = inputs(num_tokens, index_dtype=torch.int64 if expert_map is None else torch.int32).topk_ids
    opcheck(ROUTE_OP, (ids.T.contiguous().T, 4, 8, expert_map))


def test_opcheck_with_inputs_that_require_grad():
    tensors, options = split(inputs(5, bias=True))
    tensors = tuple(x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors)
    # Without the fourth, which runs a backward where an input requires grad.
    opcheck(OP, tensors, options, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def signature(x: torch.Tensor) -> tuple:
    return x.shape, x.dtype, x.stride()


def with_tensors(args: Arguments, function) -> tuple[tuple, dict]:
    tensors, options = split(args)
    return tuple(x if x is None else function(x) for x in tensors), options


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fake_and_meta_equal_real(case):
    args = inputs(**case)
    tensors, options = split(args)
    real = OP(*tensors, **options)
    fake_mode = FakeTensorMode()
    fake_tensors, options = with_tensors(args, fake_mode.from_tensor)
    with fake_mode:
        fake = OP(*fake_tensors, **options)
    assert signature(fake) == signature(real) and fake.device == real.device
    meta_tensors, options = with_tensors(args, lambda x: x.to("meta"))
    meta = OP(*meta_tensors, **options)
    assert signature(meta) == signature(real) and meta.device.type == "meta"
    assert real.dtype == (args.out_dtype or args.hidden_states.dtype) and real.is_contiguous()


def test_route_fake_and_meta_equal_real():
    ids = inputs(5).topk_ids
    real, meta = moe_ops.route(ids, 4, 8), moe_ops.route(ids.to("meta"), 4, 8)
    with FakeTensorMode() as mode:
        fake = moe_ops.route(mode.from_tensor(ids), 4, 8)
    assert list(map(signature, real)) == list(map(signature, meta)) == list(map(signature, fake))


def test_autocast_does_not_cast_behind_the_callers_back():
    args = inputs(5)
    tensors, options = split(args)
    with torch.autocast("cpu", torch.bfloat16):
        projected = torch.nn.functional.linear(args.hidden_states, torch.eye(SIZES["hidden"]))
        assert projected.dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"w1\.to\(torch\.bfloat16\) or hidden_states\.to\(torch\.float32\)"):
            OP(projected, *tensors[1:], **options)
        assert OP(*tensors, **options).dtype == torch.float32


# No backward.


def parameters(args: Arguments) -> tuple:
    """The call's tensors with weights as a module would hold them."""
    tensors = list(split(args)[0])
    tensors[1:3] = [torch.nn.Parameter(x) for x in tensors[1:3]]
    return tuple(tensors)


def test_forward_with_parameters_and_no_backward():
    args = inputs(5)
    expected = OP(*split(args)[0])
    result = OP(*parameters(args))
    assert torch.equal(result, expected) and result.requires_grad
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        result.sum().backward()
    with torch.no_grad():
        assert not OP(*parameters(args)).requires_grad
    with torch.inference_mode():
        assert OP(*parameters(args)).is_inference()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_modes_and_subclasses_see_the_op(needs_grad):
    """The autograd kernel of the op hands it on, and whatever waits below sees it."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    args = inputs(5)
    tensors = parameters(args) if needs_grad else split(args)[0]
    for _ in range(2):
        expected = OP(*tensors)
        with Mode():
            assert torch.equal(OP(*tensors), expected)
        assert seen[0] is OP
        seen.clear()
        two = TwoTensor(tensors[0], tensors[0])
        assert isinstance(OP(two, *tensors[1:]), TwoTensor)


def test_no_recording_between_autograd_and_the_kernel():
    """Weights that require grad do not make the backend's own operations nodes of a graph."""
    result = OP(*parameters(inputs(5)))
    weights = [node for node, _ in result.grad_fn.next_functions if node is not None]
    assert len(weights) == 2 and all(type(node).__name__ == "AccumulateGrad" for node in weights)
    assert not OP(*split(inputs(5))[0]).requires_grad


def test_only_ordinary_tensors_go_to_the_kernel_without_a_dispatch(monkeypatch):
    """A kernel that reads memory would read a lazily negated tensor's with the wrong sign."""
    tensors, _ = split(inputs(5))
    expected = OP(*tensors)
    direct = []
    monkeypatch.setattr(registration, "_fused_moe", lambda *args, **kwargs: direct.append(args) or expected)
    OP(*tensors)
    OP(*parameters(inputs(5)))
    assert len(direct) == 2
    for negated in (0, 1, 3):
        given = [torch._neg_view(-x) if i == negated else x for i, x in enumerate(tensors)]
        assert given[negated].is_neg()
        assert torch.equal(OP(*given), expected)
    assert len(direct) == 2


def test_tangents_do_not_reach_the_backend():
    """Forward-mode differentiation of the backend's own operations would fail in the middle of it."""
    tensors, _ = split(inputs(5))
    for _ in range(2):
        with forward_ad.dual_level():
            result = OP(forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0])), *tensors[1:])
            assert forward_ad.unpack_dual(result).tangent is None
        assert torch.equal(result, OP(*tensors))


def test_transforms_of_torch_func():
    tensors, _ = split(inputs(5))
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        torch.func.grad(lambda x: OP(x, *tensors[1:]).sum())(tensors[0])
    several = torch.vmap(lambda x: OP(x, *tensors[1:]))(torch.stack([tensors[0], tensors[0] * 2]))
    torch.testing.assert_close(several[0], OP(*tensors))


def test_no_backward_for_hidden_states_alone():
    tensors, _ = split(inputs(5))
    tensors[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        torch.autograd.grad(OP(*tensors).sum(), tensors[0])


# torch.compile.


def block(x, *tensors):
    """The op between others; `x` and what follows keep a symbolic number of tokens."""
    return moe_ops.fused_moe(x * 2, *tensors) + x


def num_graphs(counter: CompileCounterWithBackend) -> int:
    """Graphs that were compiled and do something; torch may hand the backend an empty one beside them."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


def test_compile_with_parameters_and_no_backward():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for num_tokens in (1, 2, 7, 33):
        tensors = parameters(inputs(num_tokens, bias=True))
        torch.testing.assert_close(compiled(*tensors), block(*tensors))
    # One token is compiled for itself, as every size of 0 or 1 is.
    assert 1 <= num_graphs(counter) <= 2
    result = compiled(*parameters(inputs(7, bias=True)))
    assert result.requires_grad
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        result.sum().backward()


def test_compile_keeps_strides_and_unsummed_routes():
    torch._dynamo.reset()
    args = inputs(5, hidden_layout="transposed", n_major=True, reduce_topk=False)
    tensors, options = split(args)
    compiled = torch.compile(OP, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert signature(compiled(*tensors, **options)) == signature(OP(*tensors, **options))


def test_compile_route():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda ids: moe_ops.route(ids + 0, 4, 8), backend=counter, fullgraph=True, dynamic=True)
    for num_tokens in (2, 7, 33):
        ids = inputs(num_tokens).topk_ids
        for got, expected in zip(compiled(ids), moe_ops.route(ids, 4, 8), strict=True):
            assert torch.equal(got, expected)
    assert num_graphs(counter) == 1


def test_compile_says_what_is_wrong():
    torch._dynamo.reset()
    tensors, _ = split(inputs(5))
    compiled = torch.compile(OP, backend="aot_eager", fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match="topk_weights has shape") as error:
        compiled(*tensors[:3], tensors[3][1:], tensors[4])
    assert not isinstance(error.value, AssertionError)
    torch._dynamo.reset()


# The out-variant.


def reference(args: Arguments) -> torch.Tensor:
    return fused_moe_reference(args).to(args.hidden_states.dtype)


@pytest.mark.parametrize("layout", ["contiguous", "columns-of-wider-rows", "transposed", "beside-an-input"])
def test_out_layouts(layout):
    args = inputs(5)
    m, h = args.hidden_states.shape
    if layout == "contiguous":
        out, around = torch.empty(m, h), None
    elif layout == "columns-of-wider-rows":
        around = torch.full((m, 2 * h), 7.0)
        out = around[:, :h]
    elif layout == "transposed":
        out, around = torch.empty(h, m).T, None
    else:
        around = torch.cat([args.hidden_states, torch.zeros(m, h)])
        args.hidden_states, out = around[:m], around[m:]
    expected = reference(args)
    assert OUT_OP(out, *split(args)[0]) is None
    torch.testing.assert_close(out, expected)
    if layout == "columns-of-wider-rows":
        assert (around[:, h:] == 7).all()


def test_out_of_unsummed_routes_and_of_no_tokens():
    args = inputs(5, reduce_topk=False, routing="hostile")
    out = out_for(args)
    OUT_OP(out, *split(args)[0], reduce_topk=False)
    torch.testing.assert_close(out, reference(args))
    OUT_OP(torch.empty(0, SIZES["hidden"]), *split(inputs(0))[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_out_has_no_history(mode):
    with mode():
        args = inputs(5)
        out = torch.empty(5, SIZES["hidden"])
        version = None if out.is_inference() else out._version
        OUT_OP(out, *parameters(args))
        assert not out.requires_grad
        torch.testing.assert_close(out, reference(args))
        assert version is None or out._version > version


def test_out_is_written_where_autograd_can_see_it():
    """A tensor saved for a backward and overwritten by the op is an error, not a wrong gradient."""
    out, x = torch.ones(5, SIZES["hidden"]), torch.ones(5, SIZES["hidden"], requires_grad=True)
    product = (x * out).sum()
    OUT_OP(out, *split(inputs(5))[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out_compiled(backend):
    torch._dynamo.reset()

    def function(out, x, *tensors):
        OUT_OP(out, x * 2, *tensors)
        return out + 1

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for num_tokens in (2, 7):
        args = inputs(num_tokens)
        out = torch.full_like(args.hidden_states, torch.nan)
        with torch.no_grad():
            result = compiled(out, *split(args)[0])
        args.hidden_states = args.hidden_states * 2
        torch.testing.assert_close(out, reference(args))
        torch.testing.assert_close(result, out + 1)
    assert num_graphs(counter) == 1
