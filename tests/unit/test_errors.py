"""Bad calls: every one raises the right exception, and its message says what, got, expected and the way out.

The table is also run by `python -O` (see `main`), which removes `assert` statements from tests too. So the checks in
this file raise by hand, and only those at the end that pytest alone runs may use `assert`.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from tests.unit.quantized_errors import bad_calls

OP = torch.ops.moe_ops.fused_moe_tma.default
OUT_OP = torch.ops.moe_ops.fused_moe_tma_.default
ROUTE_OP = torch.ops.moe_ops.route.default
M, H, I, E, TOP_K, E_GLOBAL = 5, 16, 24, 4, 2, 6  # noqa: E741
NAN, INF = float("nan"), float("inf")


def good_call() -> dict:
    """A call that works and has every tensor an unquantised call may have."""
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator)
    return {
        "hidden_states": random(M, H),
        "w1": random(E, 2 * I, H),
        "w2": random(E, H, I),
        "topk_weights": random(M, TOP_K),
        "topk_ids": torch.randint(0, E_GLOBAL, (M, TOP_K), generator=generator),
        "w1_bias": random(E, 2 * I),
        "w2_bias": random(E, H),
        "expert_map": torch.tensor([3, -1, 0, 1, -1, 2], dtype=torch.int32),
    }


def good_route() -> dict:
    """The arguments of a `route` call that works."""
    call = good_call()
    return {"topk_ids": call["topk_ids"], "num_experts": E, "block": 8, "expert_map": call["expert_map"]}


def call_out_op(call: dict) -> None:
    """The out-variant, with a good buffer unless the call brings its own."""
    OUT_OP(**{"out": torch.empty(M, H), **call})


def call_fake(call: dict) -> None:
    """The op on fake tensors, as torch.compile and torch.export trace it."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    op = OUT_OP if "out" in call else OP
    with mode:
        op(**{name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()})


CALLERS = {
    "op": lambda call: OP(**call),
    "fused_moe": lambda call: moe_ops.fused_moe(**call),
    "explain": lambda call: moe_ops.explain(**call),
    "out_op": call_out_op,
    "fake": call_fake,
    "route": lambda call: moe_ops.route(**call),
    "route_op": lambda call: ROUTE_OP(**call),
}
ALL = ("op", "fused_moe", "explain", "out_op", "fake")
EAGER = ("op", "fused_moe", "explain", "out_op")  # a fake neither plans, nor has an address, nor is on "meta"
SCHEMA = ("op", "fused_moe", "out_op")  # calls whose types torch checks against the schema
OUT, OUT_EAGER = ("out_op", "fake"), ("out_op",)
ROUTE = ("route", "route_op")


@dataclass(frozen=True)
class Case:
    """One bad call: how to damage a good one, and what must come of it."""

    name: str
    argument: str
    damage: Callable[[dict], None]
    error: type[Exception]
    words: tuple[str, ...]
    callers: tuple[str, ...]


CASES = []


def case(name: str, argument: str, damage, error: type[Exception], *words: str, callers: tuple[str, ...] = ALL) -> None:
    CASES.append(Case(name, argument, damage, error, words, callers))


def put(**values) -> Callable[[dict], None]:
    """Damage: sets arguments to values."""
    return lambda call: call.update(values)


def edit(**functions) -> Callable[[dict], None]:
    """Damage: replaces arguments by functions of them."""
    return lambda call: call.update({name: function(call[name]) for name, function in functions.items()})


def to(dtype_or_device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(dtype_or_device)


# fmt: off
# Dtypes.
COMPUTE = "expected torch.bfloat16 or torch.float16 or torch.float32"
for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64):
    case(f"hidden_states-{dtype}", "hidden_states", edit(hidden_states=to(dtype)), TypeError,
         f"has dtype {dtype}", COMPUTE, "cast it", "hidden_states.to(torch.bfloat16)")
for name, dtype in (("w1", torch.bfloat16), ("w1", torch.int8), ("w2", torch.float8_e4m3fn), ("w2", torch.float64)):
    case(f"{name}-{dtype}", name, edit(**{name: to(dtype)}), TypeError,
         f"{name} has dtype {dtype}, expected torch.float32, the dtype of hidden_states",
         f"cast one of them: {name}.to(torch.float32) or hidden_states.to({dtype})" if dtype == torch.bfloat16 else
         f"pass quantization= and scales if it is quantised, or cast it: {name}.to(torch.float32)")
case("both-weights", "w1", edit(w1=to(torch.bfloat16), w2=to(torch.bfloat16)), TypeError, "hidden_states.to(torch.bf")
for name, dtypes, expected, cast in (
    ("w1_bias", (torch.float16, torch.int32), "torch.float32", "float32"),
    ("w2_bias", (torch.float64, torch.bool), "torch.float32", "float32"),
    ("topk_weights", (torch.int64, torch.float8_e5m2, torch.complex64), "a floating-point dtype", "float32"),
    ("topk_ids", (torch.float32, torch.int16, torch.uint8, torch.bool), "torch.int32 or torch.int64", "int32"),
    ("expert_map", (torch.int64, torch.float32), "torch.int32", "int32"),
):
    for dtype in dtypes:
        case(f"{name}-{dtype}", name, edit(**{name: to(dtype)}), TypeError,
             f"{name} has dtype {dtype}", f"expected {expected}", f"cast it: {name}.to(torch.{cast})")
for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn):
    case(f"out_dtype-{dtype}", "out_dtype", put(out_dtype=dtype), TypeError,
         f"out_dtype is {dtype}", COMPUTE, "or None")
case("ids-and-weights-swapped", "topk_ids",
     lambda call: call.update(topk_ids=call["topk_weights"], topk_weights=call["topk_ids"]), TypeError,
     "topk_ids has dtype torch.float32", "expected torch.int32 or torch.int64")

# Numbers of dimensions.
for name, function, got, expected in (
    ("hidden_states", lambda x: x[0], [H], "2 dimensions: [M, H]"),
    ("hidden_states", lambda x: x[None], [1, M, H], "2 dimensions: [M, H]"),
    ("w1", lambda x: x[0], [2 * I, H], "3 dimensions: [E, 2 * I, H]"),
    ("w2", lambda x: x.flatten(), [E * H * I], "3 dimensions: [E, H, I]"),
    ("topk_ids", lambda x: x[:, 0], [M], "2 dimensions: [M, top_k]"),
    ("topk_ids", lambda x: x[0, 0], [], "2 dimensions: [M, top_k]"),
    ("topk_weights", lambda x: x[:, 0], [M], f"[{M}, {TOP_K}]: [M, top_k], as topk_ids"),
    ("w1_bias", lambda x: x[0], [2 * I], f"[{E}, {2 * I}]: [E, 2 * I], the rows of w1"),
    ("w2_bias", lambda x: x[:, None], [E, 1, H], f"[{E}, {H}]: [E, H]"),
    ("expert_map", lambda x: x[None], [1, E_GLOBAL], "1 dimensions: [E_global]"),
):
    case(f"{name}-{len(got)}d", name, edit(**{name: function}), ValueError,
         f"{name} has shape {got}", f"expected {expected}")

# Shapes. A w2 whose E or I is not w1's is reported as w1's mismatch; the message then says where E and I come from.
for label, name, damage, got, expected, *words in (
    ("ungated-rows", "w1", edit(w1=lambda x: x[:, :I]), [E, I, H], [E, 2 * I, H], "activation 'silu'"),
    ("gated-rows", "w1", put(activation="relu2_no_gate"), [E, 2 * I, H], [E, I, H], "activation 'relu2_no_gate'"),
    ("odd-rows", "w1", edit(w1=lambda x: x[:, 1:]), [E, 2 * I - 1, H], [E, 2 * I, H], f"I from w2 {[E, H, I]}"),
    ("hidden-size", "w1", edit(w1=lambda x: x[..., 1:]), [E, 2 * I, H - 1], [E, 2 * I, H],
     f"H from hidden_states {[M, H]}"),
    ("experts", "w1", edit(w1=lambda x: x[1:]), [E - 1, 2 * I, H], [E, 2 * I, H], "E and I from w2"),
    ("transposed", "w1", edit(w1=lambda x: x.mT), [E, H, 2 * I], [E, 2 * I, H]),
    ("hidden-size", "w2", edit(w2=lambda x: x[:, 1:]), [E, H - 1, I], [E, H, I], "H from hidden_states"),
    ("experts", "w2", edit(w2=lambda x: x[1:]), [E, 2 * I, H], [E - 1, 2 * I, H], f"E and I from w2 {[E - 1, H, I]}"),
    ("transposed", "w2", edit(w2=lambda x: x.mT), [E, I, H], [E, H, H], "H from hidden_states"),
    ("tokens", "topk_ids", edit(topk_ids=lambda x: x[1:]), [M - 1, TOP_K], [M, TOP_K], "M from hidden_states"),
    ("tokens", "topk_weights", edit(topk_weights=lambda x: x[1:]), [M - 1, TOP_K], [M, TOP_K], "as topk_ids"),
    ("top-k", "topk_weights", edit(topk_weights=lambda x: x[:, 1:]), [M, TOP_K - 1], [M, TOP_K], "as topk_ids"),
    ("rows", "w1_bias", edit(w1_bias=lambda x: x[:, :I]), [E, I], [E, 2 * I], "the rows of w1"),
    ("experts", "w1_bias", edit(w1_bias=lambda x: x[1:]), [E - 1, 2 * I], [E, 2 * I], "the rows of w1"),
    ("hidden-size", "w2_bias", edit(w2_bias=lambda x: x[:, 1:]), [E, H - 1], [E, H]),
    ("experts", "w2_bias", edit(w2_bias=lambda x: x[1:]), [E - 1, H], [E, H]),
):
    case(f"{name}-{label}", name, damage, ValueError, f"has shape {got}", f"expected {expected}", *words)
for name, size, damage in (
    ("hidden_states", "H", edit(hidden_states=lambda x: x[:, :0], w1=lambda x: x[..., :0], w2=lambda x: x[:, :0])),
    ("w2", "I", edit(w1=lambda x: x[:, :0], w2=lambda x: x[..., :0])),
    ("w2", "E", edit(w1=lambda x: x[:0], w2=lambda x: x[:0])),
    ("topk_ids", "top_k", edit(topk_ids=lambda x: x[:, :0], topk_weights=lambda x: x[:, :0])),
):
    case(f"{size}-0", name, damage, ValueError, f"{name}: {size} is 0", "expected at least 1")
case("too-many-routes", "topk_ids",
     edit(hidden_states=lambda x: x[:1].expand(2**26, H), topk_ids=lambda x: x[:1, :1].expand(2**26, 32),
          topk_weights=lambda x: x[:1, :1].expand(2**26, 32)), ValueError,
     f"M * top_k = {2**31} routes", f"expected fewer than {2**31 - 256 * E}", "split the tokens over several calls",
     callers=("op", "fused_moe", "explain", "fake"))

# Devices. The meta device stands for any other one.
for name in ("w1", "w2", "topk_weights", "w1_bias", "w2_bias"):
    case(f"{name}-device", name, edit(**{name: to("meta")}), ValueError,
         f"{name} is on meta", "expected cpu, where hidden_states is", f"move it: {name}.to('cpu')", callers=EAGER)
case("topk_ids-device", "topk_ids",
     lambda call: call.update(topk_ids=call["topk_ids"].to("meta"), expert_map=None), ValueError,
     "topk_ids is on meta", "expected cpu, where hidden_states is", "move it: topk_ids.to('cpu')", callers=EAGER)
case("expert_map-device", "expert_map", edit(expert_map=to("meta")), ValueError,
     "expert_map is on meta", "expected cpu, where topk_ids is", "move it: expert_map.to('cpu')", callers=EAGER)
case("hidden_states-device", "hidden_states", edit(hidden_states=to("meta")), ValueError,
     "w1 is on cpu", "expected meta, where hidden_states is", "move it: w1.to('meta')", callers=EAGER)

# Options an activation does not use, and values that mean nothing.
NO_GATE = ("silu_no_gate", "gelu_no_gate", "relu2_no_gate")
for argument, value, lack, activations, *words in (
    ("activation_alpha", 1.5, "slope", ("silu", "gelu", "gelu_tanh", *NO_GATE), "use activation='swigluoai'"),
    ("activation_limit", 7.0, "clamp", ("gelu", "gelu_tanh", *NO_GATE), "use activation='silu' or 'swigluoai'"),
    ("gate_up_layout", "interleaved", "gate", NO_GATE),
):
    for activation in activations:
        case(f"{argument}-{activation}", argument, put(**{"activation": activation, argument: value}), ValueError,
             f"{argument} is {value!r}", f"activation {activation!r} has no {lack}", "leave it out", *words)
for value in (NAN, INF, -INF):
    case(f"alpha-{value}", "activation_alpha", put(activation="swigluoai", activation_alpha=value), ValueError,
         f"activation_alpha is {value}", "expected a finite number")
    case(f"factor-{value}", "routed_scaling_factor", put(routed_scaling_factor=value), ValueError,
         f"routed_scaling_factor is {value}", "expected a finite number")
for value in (NAN, -INF, 0.0, -7.0):
    case(f"limit-{value}", "activation_limit", put(activation_limit=value), ValueError,
         f"activation_limit is {value}", "expected a number above 0")

# Names.
for argument, value, known in (
    ("activation", "swiglu", ("'silu'", "'gelu'", "'gelu_tanh'", "'swigluoai'", "'relu2_no_gate'", "'silu_no_gate'")),
    ("activation", "SiLU", ("'silu'",)),
    ("activation", "", ("'silu'",)),
    ("gate_up_layout", "split", ("'concatenated'", "'interleaved'")),
    ("quantization", "fp4", ("'none'", "'fp8_w8a8'", "'int8_w8a8'", "'int8_w8a16'", "'int4_w4a16'", "'mxfp4_w4a16'")),
    ("path", "cuda", ("'auto'", "'tma'", "'classic'", "'reference'")),
):
    case(f"{argument}-{value or 'empty'}", argument, put(**{argument: value}), ValueError,
         f"{argument} is {value!r}", "expected one of", *known)

# Quantisation.
for name, argument, damage, error, *words in bad_calls(M, H, I, E):
    case(name, argument, damage, error, *words)
for name in ("w1_scale", "w2_scale", "w1_zero_point", "w2_zero_point", "a1_scale", "a2_scale"):
    case(f"{name}-unquantised", name, put(**{name: torch.ones(E)}), ValueError,
         f"{name} was given", "quantization is 'none'", "leave it out")
for block_shape in ([128, 128], []):
    case(f"block_shape-{len(block_shape)}", "block_shape", put(block_shape=block_shape), ValueError,
         "block_shape was given", "quantization is 'none'", "leave it out")

# Paths that cannot run.
for path in ("tma", "classic"):
    case(f"path-{path}-on-cpu", "path", put(path=path), ValueError,
         f"path is {path!r}", "the tensors are on the CPU", "move them to a CUDA device", "path='auto'",
         "TRITON_INTERPRET=1", callers=EAGER)

# Not tensors, and other wrong types. torch checks a call of the op against its schema, which lets None pass.
for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids"):
    case(f"{name}-None", name, put(**{name: None}), TypeError, f"{name} is NoneType", "expected a torch.Tensor")
for name, value in (("hidden_states", 3), ("w1", [[1.0]]), ("topk_ids", "ids"), ("w1_bias", 0.0), ("expert_map", [0])):
    case(f"{name}-not-tensor", name, put(**{name: value}), TypeError,
         f"{name} is {type(value).__name__}", "expected a torch.Tensor", callers=("explain",))
for name, value in (
    ("hidden_states", 3), ("w1", [[1.0]]), ("topk_ids", "ids"), ("w1_bias", 0.0), ("expert_map", [0]),
    ("activation", 1), ("activation_limit", "7"), ("routed_scaling_factor", None), ("block_shape", "128"),
    ("apply_router_weight_on_input", "yes"), ("reduce_topk", "no"), ("deterministic", "yes"), ("out_dtype", "bfloat16"),
):
    case(f"{name}-{type(value).__name__}-schema", name, put(**{name: value}), RuntimeError,
         name, "Expected a value of type", type(value).__name__, callers=SCHEMA)

# The out-variant's buffer.
for label, got, options, expected in (
    ("rows", [M + 1, H], {}, [M, H]),
    ("columns", [M, H + 1], {}, [M, H]),
    ("routes-for-their-sum", [M, TOP_K, H], {}, [M, H]),
    ("sum-for-the-routes", [M, H], {"reduce_topk": False}, [M, TOP_K, H]),
):
    case(f"out-{label}", "out", put(out=torch.empty(got), **options), ValueError, f"out has shape {got}",
         f"expected {expected}", "reduce_topk=False", callers=OUT)
case("out-bfloat16", "out", put(out=torch.empty(M, H, dtype=torch.bfloat16)), TypeError,
     "out has dtype torch.bfloat16", "expected torch.float32", "pass out_dtype=torch.bfloat16", callers=OUT)
case("out-not-out_dtype", "out", put(out=torch.empty(M, H), out_dtype=torch.float16), TypeError,
     "out has dtype torch.float32", "expected torch.float16", "pass out_dtype=torch.float32", callers=OUT)
case("out-device", "out", put(out=torch.empty(M, H, device="meta")), ValueError,
     "out is on meta", "expected cpu, where hidden_states is", callers=OUT_EAGER)
for label, out in (
    ("expanded-rows", torch.empty(1, H).expand(M, H)),
    ("expanded-columns", torch.empty(M, 1).expand(M, H)),
    ("overlapping-rows", torch.empty(M * H).as_strided((M, H), (H - 1, 1))),
):
    case(f"out-{label}", "out", put(out=out), ValueError,
         f"out has strides {list(out.stride())}", "one element may stand for several", "pass a contiguous tensor",
         callers=OUT_EAGER)
for name in ("hidden_states", "w1", "w2", "topk_weights", "w1_bias", "w2_bias"):
    case(f"out-shares-{name}", "out", lambda call, name=name: share_with_out(call, name), ValueError,
         f"out shares memory with {name}", "read while out is written", "pass another tensor", callers=OUT_EAGER)
case("out-requires-grad", "out", put(out=torch.empty(M, H, requires_grad=True)), ValueError,
     "out requires grad", "no backward", "out.detach()", "torch.no_grad()", callers=OUT)
case("out-None", "out", put(out=None), TypeError, "out is NoneType", "expected a torch.Tensor", callers=OUT)
case("out-list", "out", put(out=[0.0]), RuntimeError, "'out'", "found type 'list'", callers=OUT_EAGER)

# route.
for label, function, error, *words in (
    ("1d", lambda x: x[0], ValueError, f"has shape {[TOP_K]}", "expected 2 dimensions: [M, top_k]"),
    ("float", to(torch.float32), TypeError, "has dtype torch.float32", "torch.int32 or torch.int64", "cast it"),
    ("list", lambda x: x.tolist(), RuntimeError, "Expected a value of type 'Tensor'", "found type 'list'"),
    ("too-many", lambda x: x[:1, :1].expand(2**26, 32), ValueError, f"M * top_k = {2**31} routes", "split the tokens"),
):
    case(f"route-ids-{label}", "topk_ids", edit(topk_ids=function), error, *words, callers=ROUTE)
for name, value, expected in (
    *(("num_experts", value, f"expected 1 to {2**28 - 1}") for value in (0, -1, 2**28, 2**31)),
    *(("block", value, "expected 1 to 1024") for value in (0, -1, 1025)),
):
    case(f"route-{name}-{value}", name, put(**{name: value}), ValueError, f"{name} is {value}", expected, callers=ROUTE)
for label, function, error, *words in (
    ("int64", to(torch.int64), TypeError, "has dtype torch.int64", "torch.int32", "expert_map.to(torch.int32)"),
    ("2d", lambda x: x[None], ValueError, f"has shape {[1, E_GLOBAL]}", "expected 1 dimensions: [E_global]"),
    ("device", to("meta"), ValueError, "is on meta", "expected cpu, where topk_ids is", "expert_map.to('cpu')"),
):
    case(f"route-map-{label}", "expert_map", edit(expert_map=function), error, *words, callers=ROUTE)
# fmt: on


def share_with_out(call: dict, name: str) -> None:
    """Moves an input to the start of a buffer that is `out` as well."""
    tensor = call[name]
    buffer = torch.zeros(max(M * H, tensor.numel()))
    buffer[: tensor.numel()] = tensor.flatten()
    call.update({name: buffer[: tensor.numel()].view(tensor.shape), "out": buffer[: M * H].view(M, H)})


def check(case: Case, caller: str) -> None:
    """Makes a case's call and raises if what comes of it is not what the case says."""
    is_route = caller in ROUTE
    call = good_route() if is_route else good_call()
    case.damage(call)
    try:
        CALLERS[caller](call)
    except Exception as error:
        raised = error
    else:
        raise RuntimeError(f"{case.name} through {caller}: nothing was raised")
    message = str(raised)
    if type(raised) is not case.error:
        raise RuntimeError(f"{case.name} through {caller}: {case.error} expected, got {raised!r}") from raised
    missing = [word for word in (case.argument, *case.words) if word not in message]
    if missing:
        raise RuntimeError(f"{case.name} through {caller}: {missing} not in {message!r}")
    # A refused call leaves nothing behind: the next good one gives what it always gave.
    again = moe_ops.route(**good_route()) if is_route else [OP(**good_call())]
    if not all(map(torch.equal, again, GOOD_ROUTING if is_route else [GOOD_RESULT])):
        raise RuntimeError(f"{case.name} through {caller}: a good call afterwards gives another result")


GOOD_RESULT = OP(**good_call())
GOOD_ROUTING = moe_ops.route(**good_route())


def main() -> None:
    """Runs the table without pytest and without `assert`."""
    count = 0
    for case in CASES:
        for caller in case.callers:
            check(case, caller)
            count += 1
    print(f"{count} bad calls, debug={__debug__}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_call(case):
    for caller in case.callers:
        check(case, caller)


def test_table_covers_every_argument():
    arguments = {argument.name for op in (OP, OUT_OP, ROUTE_OP) for argument in op._schema.arguments}
    assert {case.argument for case in CASES} == arguments
    assert len({case.name for case in CASES}) == len(CASES) >= 60
    assert not any(issubclass(case.error, AssertionError) for case in CASES)


@pytest.mark.parametrize(
    ("damage", "error", "word", "complaint"),
    [
        (put(), ValueError, "", "nothing was raised"),
        (put(path="cuda"), TypeError, "", "expected, got ValueError"),
        (put(path="cuda"), ValueError, "a word it does not have", "not in"),
    ],
)
def test_check_can_fail(damage, error, word, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        check(Case("bad", "path", damage, error, (word,), ("op",)), "op")


def test_optimized_python_changes_nothing():
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-O", __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{sum(len(case.callers) for case in CASES)} bad calls, debug=False"


if __name__ == "__main__":
    main()
