"""Hypothesis strategies for whole calls of the op. Needs hypothesis, which `moe_ops.testing` itself does not.

A drawn `Call` is a description, and its repr an expression: what a failing test prints builds the call again.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_ops.activations import ACTIVATIONS
from moe_ops.arguments import Arguments
from moe_ops.problem import make_problem
from moe_ops.quantization.scheme import FORMATS, GROUP, MX_GROUP
from moe_ops.reference import fused_moe_reference
from moe_ops.testing.inputs import ROUTINGS, random_inputs
from moe_ops.testing.quantized import quantized_inputs
from moe_ops.testing.rule import assert_correct, errors

LAYOUTS = ("contiguous", "sliced", "offset", "transposed", "expanded")
# A descriptor needs 16-byte steps and starts, and expands nothing.
_TMA_WEIGHT_LAYOUTS = ("contiguous", "sliced", "transposed")
# Results of fewer elements are too few for the rule's statistics in float32, or beside rows rounded to 8 bits.
_FEW = 1024
_PACKED = ("int4_w4a16", "mxfp4_w4a16")
_QUANTIZED_ROWS = ("fp8_w8a8", "int8_w8a8")
_TENSORS = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "w1_bias", "w2_bias", "expert_map")


@dataclass(frozen=True, repr=False)
class Call:
    """A call of the op in a few words.

    Attributes:
        num_tokens: M.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: routes per token.
        dtype: of hidden states and weights.
        routing: one of `ROUTINGS`; without effect where there is an expert_map, whose ids are any.
        index_dtype: of topk_ids.
        weights_dtype: of topk_weights.
        w1_bias: dtype of the bias; None for none.
        w2_bias: likewise.
        expert_map: the local expert of each global one; None for no map.
        layouts: one of `LAYOUTS` by name of the tensor argument; contiguous where it is not named.
        options: all other arguments of the op.
        seed: of the values.
        quantized: what `quantized_inputs` takes of formats, as `formats` draws it; empty for unquantised weights. dtype
            is then that of the hidden states before they are quantised.
    """

    num_tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.float32
    routing: str = "uniform"
    index_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    w1_bias: torch.dtype | None = None
    w2_bias: torch.dtype | None = None
    expert_map: tuple[int, ...] | None = None
    layouts: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    quantized: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The call that makes it, without defaults."""
        shown = [
            f"{f.name}={value!r}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != (f.default if f.default_factory is MISSING else f.default_factory())
        ]
        return f"Call({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        printer.text(repr(self))


def build(call: Call, device: str = "cpu") -> Arguments:
    """Makes a call's arguments; the same ones every time.

    Args:
        call: what to make.
        device: where the tensors live.

    Returns:
        The arguments.

    Raises:
        ValueError: a layout is not one of `LAYOUTS`.

    Example:
        >>> from moe_ops.testing.strategies import Call, build
        >>> args = build(Call(3, 16, 8, experts=4, top_k=2, layouts={"w1": "transposed"}))
        >>> args.w1.shape, args.w1.stride()
        (torch.Size([4, 16, 16]), (256, 1, 16))
    """
    make: Callable[..., Arguments] = quantized_inputs if call.quantized else random_inputs
    args = make(
        num_tokens=call.num_tokens, hidden=call.hidden, intermediate=call.intermediate, experts=call.experts,
        top_k=call.top_k, dtype=call.dtype, device=device, routing=call.routing, bias=True,
        index_dtype=call.index_dtype, seed=call.seed, **call.quantized, **call.options,
    )  # fmt: skip
    args.topk_weights = args.topk_weights.to(call.weights_dtype)
    for name in ("w1_bias", "w2_bias"):
        dtype = getattr(call, name)
        setattr(args, name, None if dtype is None else getattr(args, name).to(dtype))
    if call.expert_map is not None:
        args.expert_map = torch.tensor(call.expert_map, dtype=torch.int32, device=device)
        generator = torch.Generator(device=device).manual_seed(call.seed)
        known = len(call.expert_map)
        args.topk_ids = torch.randint(
            -1, known + 1, args.topk_ids.shape, generator=generator, dtype=call.index_dtype, device=device
        )
    for name, layout in call.layouts.items():
        setattr(args, name, _lay_out(getattr(args, name), layout))
    return args


def assert_result(out: Tensor, args: Arguments) -> None:
    """`assert_correct` for any call that may be drawn.

    A result may be empty or all zeros. One of few elements may be wrong by 8 units in the last place in float32, and by
    one in 16 bits where the format rounds rows to 8.

    Args:
        out: the result.
        args: the call it is the result of.

    Raises:
        AssertionError: the result is wrong.

    Example:
        >>> from moe_ops.testing.strategies import Call, assert_result, build
        >>> args = build(Call(0, 16, 8, experts=4, top_k=2))
        >>> assert_result(torch.ops.moe_ops.fused_moe_tma(*args.tensors().values()), args)
    """
    reference = fused_moe_reference(args)
    problem = make_problem(args)
    dtype = problem.out_dtype
    if out.shape != reference.shape or out.dtype != dtype:
        raise AssertionError(f"the result is {out.dtype} {list(out.shape)}, expected {dtype} {list(reference.shape)}")
    if not (reference != 0).any():
        if (out != 0).any():
            raise AssertionError(f"{int((out != 0).sum())} elements are not 0, though all routes are dropped")
        return
    float32 = problem.dtype == torch.float32
    elements = int((reference != 0).any(-1).sum()) * reference.shape[-1]  # rows of dropped routes say nothing
    few = (float32 or problem.scheme.act) and elements < _FEW
    # Few elements share the errors of fewer activations, and the emulator's may all be small by luck.
    if not few or errors(out, reference).max > (8 if float32 else 1) * torch.finfo(problem.dtype).eps:
        assert_correct(out, args, reference=reference)


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of a tensor ("expanded": those of its first row, for all) in other strides, amid values of no use."""
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "sliced":
            # Steps and start stay multiples of 16 bytes where they were.
            start = 16 if tensor.dtype.itemsize == 1 else 8
            return _amid(tensor, (*tensor.shape[:-1], tensor.shape[-1] + 3 * start), start)
        case "offset":
            return _amid(tensor, (tensor.numel() + 1,), 1)
        case "transposed" if tensor.ndim > 1:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "transposed":
            # Steps of 2 are what one dimension has of it.
            return _amid(tensor[:, None], (tensor.shape[0], 2), 1)[:, 0]
        case "expanded":
            return tensor[:1].expand_as(tensor)
    raise ValueError(f"layout is {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")


def _amid(tensor: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    """A copy of a tensor inside a buffer of NaN or the largest integer, `start` elements into each of its rows."""
    useless = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full(shape, useless, dtype=tensor.dtype, device=tensor.device)
    if len(shape) == tensor.ndim:
        buffer = buffer[..., start : start + tensor.shape[-1]]
    else:
        buffer = buffer[start:].view(tensor.shape)
    return buffer.copy_(tensor)


def calls(
    *,
    max_tokens: int = 48,
    max_size: int = 136,
    max_experts: int = 9,
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32),
    tma: bool = True,
    quantized: st.SearchStrategy[dict[str, Any]] | None = None,
) -> st.SearchStrategy[Call]:
    """Draws calls: shapes, routing, layouts and every option of the op that is implemented.

    Args:
        max_tokens: most tokens; there may be none.
        max_size: largest H and I.
        max_experts: most experts.
        dtypes: of hidden states and weights; results have these or float32.
        tma: only sizes and weights that the TMA path takes; else any.
        quantized: draws `Call.quantized`, as `formats` does; None for unquantised calls.

    Returns:
        The strategy.

    Example:
        >>> from hypothesis import find
        >>> find(calls(dtypes=(torch.float32,)), lambda call: call.num_tokens == 3).num_tokens
        3
    """
    return _calls(max_tokens, max_size, max_experts, dtypes, tma, st.just({}) if quantized is None else quantized)


def formats(names: tuple[str, ...] = FORMATS[1:], *, blocks: bool | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Draws how a call is quantised: the keyword arguments that `quantized_inputs` has for it.

    Args:
        names: values of `quantization`.
        blocks: whether fp8_w8a8 and int8_w8a8 have a scale per block; None for either.

    Returns:
        The strategy.

    Example:
        >>> from hypothesis import find
        >>> find(formats(("int4_w4a16",)), lambda drawn: drawn["block_shape"] == (0, 64) and "zero_points" not in drawn)
        {'quantization': 'int4_w4a16', 'block_shape': (0, 64)}
    """
    return _formats(names, blocks)


@st.composite
def _formats(draw: st.DrawFn, names: tuple[str, ...], blocks: bool | None) -> dict[str, Any]:
    name = draw(st.sampled_from(names))
    choices: dict[str, tuple[object, ...]] = {"scale_dtype": (None, torch.bfloat16, torch.float16)}
    block: tuple[int, int] | None = None
    if name in _QUANTIZED_ROWS:
        block = (GROUP, GROUP) if draw(st.booleans() if blocks is None else st.just(blocks)) else None
        choices["inputs_given"] = (False, False, True, "tensor")
        if name == "fp8_w8a8":
            choices["weight_dtype"] = (None, None, torch.float8_e5m2)
            if block is None:
                choices |= {"granularity": ("tensor", "channel"), "static": (False, True, "expert")}
    elif name == "mxfp4_w4a16":
        block = draw(st.sampled_from((None, (0, MX_GROUP))))
        choices["scale_dtype"] = (None, torch.float8_e8m0fnu)
    else:
        groups = ((0, 32), (0, 64), (0, 128))
        block = draw(st.sampled_from(groups if name == "int4_w4a16" else (None, *groups)))
        choices["zero_points"] = (False, block is not None)
    drawn = {option: draw(st.sampled_from(values)) for option, values in choices.items()}
    if drawn.get("weight_dtype") is not None and drawn["scale_dtype"] == torch.float16:
        drawn["scale_dtype"] = None  # it has no numbers as small as a weight over 57344 may be
    return {"quantization": name} | {key: value for key, value in ({"block_shape": block} | drawn).items() if value}


@st.composite
def _calls(
    draw: st.DrawFn,
    max_tokens: int,
    max_size: int,
    max_experts: int,
    dtypes: tuple[torch.dtype, ...],
    tma: bool,
    quantized: st.SearchStrategy[dict[str, Any]],
) -> Call:
    quantization = draw(quantized)
    name = quantization.get("quantization")
    sizes = _sizes(max_size, tma, name)
    # No tokens at all are an early return: left to itself hypothesis would draw them for every fourth call.
    some = st.integers(1, max_tokens)
    tokens = st.one_of(some, some, some, some, some, some, some, st.just(0))
    experts = draw(st.integers(1, max_experts))
    # As many routes as experts and more are drawn now and then.
    few = st.integers(1, min(experts, 4))
    top_k = draw(st.one_of(few, few, few, st.integers(1, experts + 3)))
    dtype = draw(st.sampled_from(dtypes))
    expert_map = draw(st.one_of(st.none(), st.none(), st.none(), _expert_maps(experts)))
    routing = draw(st.sampled_from(ROUTINGS)) if expert_map is None else "uniform"
    biases = st.sampled_from((None, dtype, torch.float32))
    w1_bias, w2_bias = draw(biases), draw(biases)
    given_tensors = {"expert_map": expert_map, "w1_bias": w1_bias, "w2_bias": w2_bias}
    layouts = {}
    for tensor in (*_TENSORS, *_quantized_tensors(quantization)):
        allowed: tuple[str, ...] = LAYOUTS
        if tma and tensor in ("w1", "w2"):
            allowed = _TMA_WEIGHT_LAYOUTS[:2] if quantization else _TMA_WEIGHT_LAYOUTS
        if routing == "hostile" and tensor in ("topk_ids", "topk_weights"):
            allowed = LAYOUTS[:-1]  # the NaN weights belong to the ids of the same places
        # Contiguous is drawn as often as all others together.
        layout = draw(st.one_of(st.just("contiguous"), st.sampled_from(allowed)))
        if layout != "contiguous" and given_tensors.get(tensor, ()) is not None:
            layouts[tensor] = layout
    counts = {"num_tokens": draw(tokens), "hidden": draw(sizes), "intermediate": draw(sizes)}
    dtypes_of: dict[str, Any] = {
        "index_dtype": draw(st.sampled_from((torch.int32, torch.int64))),
        "weights_dtype": draw(st.sampled_from((torch.float32, torch.float16))),
    }
    options = draw(_options(dtypes))
    if quantization.get("inputs_given"):
        # The compute dtype is that of the result, and of the biases.
        asked = options.get("out_dtype", dtype)
        compute = asked if asked.itemsize == 2 else torch.bfloat16
        w1_bias, w2_bias = (compute if bias == dtype else bias for bias in (w1_bias, w2_bias))
    return Call(
        **counts,
        experts=experts,
        top_k=top_k,
        dtype=dtype,
        routing=routing,
        **dtypes_of,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        expert_map=expert_map,
        layouts=layouts,
        options=options,
        seed=draw(st.integers(0, 2**16)),
        quantized=quantization,
    )


def _quantized_tensors(quantization: dict[str, Any]) -> tuple[str, ...]:
    """The tensor arguments that a quantised call has beside the others."""
    if not quantization:
        return ()
    names = ["w1_scale", "w2_scale"]
    if quantization.get("zero_points"):
        names += ["w1_zero_point", "w2_zero_point"]
    if quantization.get("static") or quantization.get("inputs_given"):
        names.append("a1_scale")
    if quantization.get("static"):
        names.append("a2_scale")
    return tuple(names)


def _sizes(largest: int, tma: bool, quantization: str | None) -> st.SearchStrategy[int]:
    """H or I: odd multiples of 8 (of 16 bytes of weights where they are quantised), whole blocks, and without TMA
    whatever else there is."""
    packed = quantization in _PACKED
    unit = 32 if packed else 16 if quantization else 8
    odd = st.integers(0, (largest // unit - 1) // 2).map(lambda n: unit * (2 * n + 1))
    whole = st.integers(1, max(1, largest // 64)).map(lambda n: 64 * n)
    any_size = st.integers(1, largest // 2).map(lambda n: 2 * n) if packed else st.integers(1, largest)
    return st.one_of(odd, whole) if tma else st.one_of(odd, whole, any_size)


def _expert_maps(experts: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Maps of a few global experts, to local ones, to -1 and to what is no expert."""
    return st.lists(st.integers(-1, experts), max_size=3 * experts).map(tuple)


@st.composite
def _options(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Arguments of the op that are no tensors; those at their defaults are left out."""
    activation = ACTIVATIONS[draw(st.sampled_from(tuple(ACTIVATIONS)))]
    choices = {
        "activation": (activation.name,),
        "gate_up_layout": ("concatenated", "interleaved") if activation.gated else ("concatenated",),
        "activation_limit": (None, 0.7, 3.0) if activation.takes_limit else (None,),
        "activation_alpha": (None, 1.1) if activation.default_alpha is not None else (None,),
        "apply_router_weight_on_input": (False, True),
        "routed_scaling_factor": (1.0, 2.5, -0.5),
        "reduce_topk": (True, False),
        "out_dtype": (None, torch.float32, *dtypes),
    }
    drawn = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    defaults = {f.name: f.default for f in fields(Arguments)}
    return {name: value for name, value in drawn.items() if value != defaults[name]}
