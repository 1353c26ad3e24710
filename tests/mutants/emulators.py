"""Wrong emulators: the op as broken implementations compute it, each by one edit of the right emulator.

An edit replaces arguments of the call, a function inside the emulator, or what becomes of the result.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from moe_ops import reference
from moe_ops.arguments import Arguments
from moe_ops.problem import make_problem
from moe_ops.quantization import dequantize_activations, quantize_activations
from moe_ops.reference import expert_weight, local_experts, split_gate_up
from moe_ops.testing import assert_correct, assert_exact, emulate, emulator, exact_inputs, random_inputs, rule
from tests.cases import OPTIONS, option_case
from tests.quantized import FORMATS, quantized_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT, MAPPED = "exact integers", "expert_map"
INPUTS = [(name, dtype) for dtype in DTYPES for name in (*OPTIONS, EXACT, MAPPED)]
QUANTIZED_INPUTS = [(name, dtype) for dtype in DTYPES for name in FORMATS]
_SIZES = {"num_tokens": 21, "hidden": 72, "intermediate": 40, "experts": 5, "top_k": 3}
# Two groups of 128 columns and more in either GEMM.
_GROUPS = {"hidden": 288, "intermediate": 160}


@functools.cache
def inputs(name: str, dtype: torch.dtype) -> Arguments:
    """A call by name; not to be edited in place."""
    if name == EXACT:
        return exact_inputs(dtype=dtype, **_SIZES)
    if name == MAPPED:
        return random_inputs(dtype=dtype, expert_map=torch.tensor([3, -1, 0, 2, 1], dtype=torch.int32), **_SIZES)
    if name in FORMATS:
        return quantized_case(name, dtype, **_GROUPS)
    return option_case(name, dtype)


@functools.cache
def oracle(name: str, dtype: torch.dtype) -> Tensor:
    """The float64 result of the call of that name."""
    return reference.fused_moe_reference(inputs(name, dtype))


@functools.cache
def emulated(name: str, dtype: torch.dtype) -> Tensor:
    """What the rule compares with; the same for every mutant."""
    return emulate(inputs(name, dtype))


def passes(result: Tensor, name: str, dtype: torch.dtype) -> bool:
    """Whether the public rule takes `result` for that of the call."""
    args = inputs(name, dtype)
    try:
        if name == EXACT:
            assert_exact(result, args)
        else:
            with mock.patch.object(rule, "emulate", lambda *_, **__: emulated(name, dtype)):
                assert_correct(result, args, reference=oracle(name, dtype))
    except AssertionError:
        return False
    return True


def _same(args: Arguments) -> dict:
    return {}


def _plainly(right: Callable[[Arguments], Tensor], args: Arguments) -> Tensor:
    return right(args)


@dataclass(frozen=True)
class Wrong:
    """An emulator with one mistake.

    Attributes:
        name: of the mutant.
        breaks: what is wrong.
        edit: call -> the arguments that are replaced; empty where the mistake cannot show.
        inside: (module, name, the function that takes its place).
        result: (emulator, call) -> the wrong result.
        dtypes: where the mistake is larger than the declared roundings.
        inputs: the calls that it is judged by.
    """

    name: str
    breaks: str
    edit: Callable[[Arguments], dict] = _same
    inside: tuple[tuple[object, str, Callable], ...] = ()
    result: Callable[[Callable[[Arguments], Tensor], Arguments], Tensor] = _plainly
    dtypes: tuple[torch.dtype, ...] = DTYPES
    inputs: tuple[tuple[str, torch.dtype], ...] = tuple(INPUTS)

    def __str__(self) -> str:
        return self.name

    def __call__(self, args: Arguments) -> Tensor:
        """The wrong result of the call."""
        with contextlib.ExitStack() as stack:
            for patch in self.inside:
                stack.enter_context(mock.patch.object(*patch))
            out = self.result(emulate, replace(args, **self.edit(args)))
        if out.dtype != make_problem(args).out_dtype:
            raise TypeError(f"{self.name} returns {out.dtype}, which the rule would reject whatever the values")
        return out


def kills(wrong: Wrong) -> list[tuple[str, torch.dtype]]:
    """The inputs with which the rule rejects a wrong emulator."""
    return [key for key in wrong.inputs if not passes(wrong(inputs(*key)), *key)]


def _zeroed(tensor: Tensor, *index) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = 0
    return tensor


def _dropped(args: Arguments) -> Tensor:
    return local_experts(args.topk_ids, args.w1.shape[0], args.expert_map) < 0


def _out_of_range(args: Arguments) -> Tensor:
    return (args.topk_ids < 0) | (args.topk_ids >= args.w1.shape[0])


def _low_precision_matmul(a: Tensor, weight: Tensor, step: int = 16) -> Tensor:
    """Sums in bfloat16, rounded every `step` products."""
    total = torch.zeros(a.shape[0], weight.shape[0], dtype=torch.bfloat16)
    for k in range(0, a.shape[1], step):
        total = (total + a[:, k : k + step] @ weight[:, k : k + step].T).bfloat16()
    return total.to(a.dtype)


def _without_last_step(a: Tensor, weight: Tensor, step: int = 32) -> Tensor:
    whole = max(step, a.shape[1] // step * step)
    return _right_matmul(a[:, :whole], weight[:, :whole])


def _bias_after_activation(args: Arguments) -> dict:
    """b1 added to act: through w2 that is a bias of the down projection."""
    if args.w1_bias is None:
        return {}
    bias = args.w1_bias[:, : args.w2.shape[2]].to(args.w2.dtype)
    return {"w1_bias": None, "w2_bias": args.w2_bias + (args.w2 @ bias[:, :, None])[:, :, 0]}


def _bias_after_router_weight(right, args: Arguments) -> Tensor:
    if args.w2_bias is None:
        return right(args)
    kept = ~_dropped(args)
    ids = torch.where(kept, args.topk_ids.long(), 0)
    bias = (args.w2_bias[ids] * kept[..., None] * args.routed_scaling_factor).float()
    out = right(replace(args, w2_bias=None))
    return (out.float() + (bias.sum(1) if args.reduce_topk else bias)).to(out.dtype)


def _low_precision_combine(right, args: Arguments) -> Tensor:
    if not args.reduce_topk:
        return right(args)
    routes = right(replace(args, reduce_topk=False))
    total = torch.zeros_like(routes[:, 0], dtype=torch.bfloat16)
    for k in range(routes.shape[1]):
        total = (total + routes[:, k]).bfloat16()
    return total.to(routes.dtype)


def _transposed_inverse(right, args: Arguments) -> Tensor:
    routes = right(replace(args, reduce_topk=False, out_dtype=torch.float32))
    tokens, top_k, hidden = routes.shape
    routes = routes.reshape(top_k, tokens, hidden).transpose(0, 1)
    return (routes.sum(1) if args.reduce_topk else routes).to(args.out_dtype or args.w1.dtype)


def _nan_weights_times_zero(right, args: Arguments) -> Tensor:
    products = torch.where(_dropped(args), 0 * args.topk_weights, 0.0)
    out = right(args)
    return out + (products.sum(1, keepdim=True) if args.reduce_topk else products[..., None]).to(out.dtype)


def _duplicates_once(args: Arguments) -> dict:
    ids = args.topk_ids
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    return {"topk_ids": torch.where(((ids[:, :, None] == ids[:, None, :]) & earlier).any(2), -1, ids)}


def _without_plus_one(up: Tensor, problem) -> Tensor:
    """(up + 1) * f(gate) less f(gate)."""
    wrong = _right_activate(up, problem)
    if problem.activation.name != "swigluoai":
        return wrong
    gate, _ = split_gate_up(up, problem.gate_up_layout)
    return wrong - reference.nonlinearity(gate.clamp(max=problem.limit), problem.activation, problem.alpha)


def _replaced(**values) -> Callable[[Arguments], dict]:
    return lambda args: values


def _up_scales_a_block_late(args: Arguments, problem, which: str, expert: int, dtype: torch.dtype) -> Tensor:
    """Blocks of the up half counted from its own first row, as if it began with a block."""
    right = expert_weight(args, problem, which, expert, dtype)
    if which != "w1" or args.block_shape != (128, 128):
        return right
    half, late = problem.intermediate_size, replace(args, w1_scale=args.w1_scale.roll(-1, 1))
    return torch.cat([right[:half], expert_weight(late, problem, which, expert, dtype)[half:]])


def _rounded_otherwise(of_act: bool, scales: Callable[[Tensor], Tensor], given: bool = False) -> tuple:
    """Rows that are multiplied with other scales than they were divided by: those of the inputs, or of the activation;
    where the op makes them, or where they are given."""

    def quantized(x: Tensor, dtype, granularity: str, scale: Tensor | None, wide: torch.dtype) -> Tensor:
        mine = (x.shape[1] == _GROUPS["intermediate"]) == of_act and (scale is not None) == given
        q, scale = quantize_activations(x, dtype, granularity, scale)
        return dequantize_activations(q, scales(scale) if mine else scale, wide)

    return ((emulator, "_quantized", quantized),)


def _a2_scale_of_expert_0(right, args: Arguments) -> Tensor:
    with contextlib.ExitStack() as stack:
        for patch in _rounded_otherwise(True, lambda scale: args.a2_scale[0], given=True):
            stack.enter_context(mock.patch.object(*patch))
        return right(args)


def _rolled(name: str, steps: int, dim: int, dims: int) -> Callable[[Arguments], dict]:
    """An argument of so many dimensions, shifted."""

    def edit(args: Arguments) -> dict:
        tensor = getattr(args, name)
        return {name: tensor.roll(steps, dim)} if tensor is not None and tensor.ndim == dims else {}

    return edit


def _nibbles_swapped(args: Arguments) -> dict:
    if args.quantization not in ("int4_w4a16", "mxfp4_w4a16"):
        return {}
    return {name: getattr(args, name) >> 4 | getattr(args, name) << 4 for name in ("w1", "w2")}


def _zero_points_ignored(args: Arguments) -> dict:
    return {"w1_zero_point": None, "w2_zero_point": None}


def _zero_points_packed_high_first(args: Arguments) -> dict:
    if args.quantization != "int4_w4a16" or args.w1_zero_point is None:
        return {}
    return {"w1_zero_point": args.w1_zero_point >> 4 | args.w1_zero_point << 4}


def _gate_and_up_scales_swapped(args: Arguments) -> dict:
    """Where every row has a scale."""
    scale = args.w1_scale
    return {"w1_scale": scale.roll(scale.shape[1] // 2, 1)} if scale.ndim > 1 and not _in_blocks(args) else {}


def _in_blocks(args: Arguments) -> bool:
    return args.block_shape == (128, 128)


_right_matmul, _right_activate = emulator._matmul, emulator.activate
_quantized = functools.partial(Wrong, inputs=tuple(QUANTIZED_INPUTS))

# fmt: off
WRONG = [
    Wrong("zeros", "nothing is computed", result=lambda right, args: torch.zeros_like(right(args))),
    Wrong("too_large", "the result times 1.003", result=lambda right, args: right(args) * 1.003),
    Wrong("gate_and_up_swapped", "act(up) * gate",
          inside=((reference, "split_gate_up", lambda up, layout: split_gate_up(up, layout)[::-1]),)),
    Wrong("interleaved_as_concatenated", "rows of w1 in the other layout",
          inside=((reference, "split_gate_up", lambda up, layout: split_gate_up(up, "concatenated")),)),
    Wrong("last_k_of_up", "the last column of w1",
          lambda args: {"w1": _zeroed(args.w1, ..., -1)}),
    Wrong("last_k_of_down", "the last column of w2",
          lambda args: {"w2": _zeroed(args.w2, ..., -1)}),
    Wrong("k_tail", "K steps that are not full", inside=((emulator, "_matmul", _without_last_step),)),
    Wrong("last_column_of_the_result", "off by one in the store",
          result=lambda right, args: _zeroed(right(args), ..., -1)),
    Wrong("bf16_accumulation", "sums over K in bfloat16", inside=((emulator, "_matmul", _low_precision_matmul),)),
    Wrong("bf16_combine", "sum over the slots in bfloat16", result=_low_precision_combine),
    Wrong("last_slot", "one of top_k slots",
          lambda args: {"topk_ids": torch.cat([args.topk_ids[:, :-1], torch.full_like(args.topk_ids[:, -1:], -1)], 1)}),
    Wrong("last_token", "the last row is not computed", result=lambda right, args: _zeroed(right(args), -1)),
    Wrong("last_expert", "the last expert's routes",
          lambda args: {"topk_ids": torch.where(args.topk_ids == args.w1.shape[0] - 1, -1, args.topk_ids)}),
    Wrong("w1_of_the_next_expert", "weights shifted by an expert", lambda args: {"w1": args.w1.roll(1, 0)}),
    Wrong("w2_of_the_next_expert", "weights shifted by an expert", lambda args: {"w2": args.w2.roll(1, 0)}),
    Wrong("router_weight_of_the_next_token", "router weights shifted by a token",
          lambda args: {"topk_weights": args.topk_weights.roll(1, 0)}),
    Wrong("router_weight_twice", "weight applied by combine and GEMM",
          lambda args: {"topk_weights": args.topk_weights.square()}),
    Wrong("router_weight_forgotten", "all routes count 1",
          lambda args: {"topk_weights": torch.ones_like(args.topk_weights)}),
    Wrong("router_weight_on_the_other_side", "before the activation for after it, and the reverse",
          lambda args: {"apply_router_weight_on_input": not args.apply_router_weight_on_input}),
    Wrong("up_bias_forgotten", "b1", _replaced(w1_bias=None)),
    Wrong("down_bias_forgotten", "b2", _replaced(w2_bias=None)),
    Wrong("up_bias_after_activation", "act(x w1) + b1", _bias_after_activation),
    Wrong("down_bias_after_router_weight", "weight * (act w2) + b2", result=_bias_after_router_weight),
    Wrong("limit_ignored", "no clamp", lambda args: {"activation_limit": 1e30} if args.activation_limit else {}),
    Wrong("alpha_ignored", "swigluoai's default slope",
          lambda args: {"activation_alpha": 1.702} if args.activation_alpha else {}),
    Wrong("plus_one_forgotten", "swigluoai's up + 1", inside=((emulator, "activate", _without_plus_one),)),
    Wrong("gelu_by_tanh", "the approximate gelu for the exact one",
          lambda args: {"activation": "gelu_tanh"} if args.activation == "gelu" else {}, dtypes=(torch.float32,)),
    Wrong("factor_forgotten", "routed_scaling_factor", _replaced(routed_scaling_factor=1.0)),
    Wrong("hostile_ids_as_expert_0", "ids out of range are clamped to 0",
          lambda args: {"topk_ids": torch.where(_out_of_range(args), 0, args.topk_ids),
                        "topk_weights": args.topk_weights.nan_to_num(0.3)}),
    Wrong("hostile_weights_times_0", "a dropped route's weight is read: 0 * NaN", result=_nan_weights_times_zero),
    Wrong("ids_narrowed_first", "2^32 + 1 is expert 1",
          lambda args: {"topk_ids": args.topk_ids.int(), "topk_weights": args.topk_weights.nan_to_num(0.3)}),
    Wrong("expert_map_ignored", "global ids taken for local ones", _replaced(expert_map=None)),
    Wrong("duplicates_once", "an expert that a token names twice counts once", _duplicates_once),
    Wrong("transposed_inverse", "routes taken as [top_k, M]", result=_transposed_inverse),
    _quantized("gate_and_up_scales_swapped", "scales of w1's rows in the other order of halves",
               _gate_and_up_scales_swapped),
    _quantized("scales_of_the_next_expert", "scales of w1 shifted by an expert",
               lambda args: {"w1_scale": args.w1_scale.roll(1, 0)}),
    _quantized("scales_of_the_next_group", "scales of w2 shifted by a group of columns", _rolled("w2_scale", 1, 2, 3)),
    _quantized("up_scales_a_block_late", "scale row of a block that gate and up share: off by one in the up half",
               inside=((emulator, "expert_weight", _up_scales_a_block_late),)),
    _quantized("inputs_by_the_next_token", "hidden states by a neighbour's scale", _rolled("a1_scale", 1, 0, 2),
               inside=_rounded_otherwise(False, lambda scale: scale.roll(1, 0))),
    _quantized("act_by_the_next_row", "the activation by a neighbour's scale",
               inside=_rounded_otherwise(True, lambda scale: scale.roll(1, 0))),
    _quantized("act_by_the_next_group", "the activation by the scale of the next 128 columns",
               inside=_rounded_otherwise(True, lambda scale: scale.roll(1, 1))),
    _quantized("a2_scale_once", "divided by the static scale, and not multiplied with it",
               inside=_rounded_otherwise(True, torch.ones_like, given=True)),
    _quantized("a2_scale_of_expert_0", "divided by the expert's scale, multiplied with expert 0's",
               result=_a2_scale_of_expert_0),
    _quantized("nibbles_swapped", "the odd column in the low nibble", _nibbles_swapped),
    _quantized("zero_points_ignored", "zero points", _zero_points_ignored),
    _quantized("zero_points_swapped", "the odd row's zero point in the low nibble", _zero_points_packed_high_first),
    _quantized("e8m0_off_by_one", "a bias of 126 for 127",
               lambda args: {"w2_scale": args.w2_scale + 1} if args.quantization == "mxfp4_w4a16" else {}),
]
# fmt: on
