"""Argument checks: the op's arguments -> `Problem`.

Pure functions: no launch, no allocation, no device synchronisation. They also run on fake tensors, whose sizes are
symbols; a condition on a symbol becomes a guard (or a runtime assertion) instead of a Python branch.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_ops.activations import ACTIVATIONS, Activation
from moe_ops.arguments import REQUIRED_TENSORS, TENSOR_ARGUMENTS, Arguments
from moe_ops.checks import either, require, require_name, require_ndim, require_shape
from moe_ops.memory import may_overlap_itself, may_share
from moe_ops.quantization.scheme import COMPUTE_DTYPES, FORMATS, Scheme, check_scales, make_scheme

GATE_UP_LAYOUTS = ("concatenated", "interleaved")
PATHS = ("auto", "tma", "classic", "reference")
INDEX_DTYPES = (torch.int32, torch.int64)

LARGEST_BLOCK = 256


@dataclass(frozen=True)
class Problem:
    """What one call asks for, checked. Sizes as in the docs: M tokens, H hidden, I intermediate, E experts.

    Attributes:
        num_tokens: M.
        hidden_size: H.
        intermediate_size: I.
        num_experts: E, the experts whose weights are here.
        num_ids: how many values `topk_ids` may take: E, or the length of `expert_map`.
        top_k: routes per token.
        dtype: the compute dtype: of the GEMMs' operands where they are not quantised, of the activation, of the routes.
        out_dtype: the dtype of the result.
        activation: the activation's row of the table.
        alpha: the activation's slope, None where it has none.
        limit: the activation's clamp, None where there is none.
        gate_up_layout: "concatenated" or "interleaved" rows of w1.
        scheme: how weights and activations are quantised.
        weight_dtype: the dtype w1 and w2 are stored in.
        w1_strides: strides of w1 in elements.
        w2_strides: strides of w2 in elements.
        w1_address: address of w1 in bytes, modulo 16: what its alignment needs.
        w2_address: likewise for w2.
        router_weight_on_input: the routing weight multiplies x @ w1^T instead of the output.
        routed_scaling_factor: multiplies the result.
        reduce_topk: False returns the routes unsummed.
        deterministic: False allows a combine whose order of additions varies.
        path: what the caller asked for.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_ids: int
    top_k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    activation: Activation
    alpha: float | None
    limit: float | None
    gate_up_layout: str
    scheme: Scheme
    weight_dtype: torch.dtype
    w1_strides: tuple[int, ...]
    w2_strides: tuple[int, ...]
    w1_address: int
    w2_address: int
    router_weight_on_input: bool
    routed_scaling_factor: float
    reduce_topk: bool
    deterministic: bool
    path: str

    @property
    def num_routes(self) -> int:
        """R = M * top_k."""
        return self.num_tokens * self.top_k

    @property
    def w1_rows(self) -> int:
        """Rows of one expert's w1: 2 * I with a gate, I without."""
        return self.intermediate_size * (2 if self.activation.gated else 1)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[M, H], or [M, top_k, H] without the sum over top_k."""
        if self.reduce_topk:
            return (self.num_tokens, self.hidden_size)
        return (self.num_tokens, self.top_k, self.hidden_size)


def make_problem(args: Arguments, *, traced: bool = False) -> Problem:
    """Checks a call and describes it.

    Args:
        args: the call.
        traced: the tensors are fake or meta ones: they have no address.

    Returns:
        The call's `Problem`.

    Raises:
        ValueError: a shape, size, device, name or combination of options is wrong.
        TypeError: a dtype is wrong, or a tensor is not a tensor.
    """
    _check_types(args)
    activation, alpha, limit = _check_activation(args)
    _check_options(args, activation)
    scheme = make_scheme(args)
    _check_shapes(args, activation, scheme)
    dtype = _check_dtypes(args, scheme)
    _check_devices(args)
    hidden_states, w1, w2 = args.hidden_states, args.w1, args.w2
    return Problem(
        num_tokens=hidden_states.shape[0],
        hidden_size=hidden_states.shape[1],
        intermediate_size=scheme.columns(w2.shape[2]),
        num_experts=w1.shape[0],
        num_ids=w1.shape[0] if args.expert_map is None else args.expert_map.shape[0],
        top_k=args.topk_ids.shape[1],
        dtype=dtype,
        out_dtype=args.out_dtype or dtype,
        activation=activation,
        alpha=alpha,
        limit=limit,
        gate_up_layout=args.gate_up_layout,
        scheme=scheme,
        weight_dtype=w1.dtype,
        w1_strides=w1.stride(),
        w2_strides=w2.stride(),
        w1_address=0 if traced else w1.data_ptr() % 16,
        w2_address=0 if traced else w2.data_ptr() % 16,
        router_weight_on_input=args.apply_router_weight_on_input,
        routed_scaling_factor=args.routed_scaling_factor,
        reduce_topk=args.reduce_topk,
        deterministic=args.deterministic,
        path=args.path,
    )


def check_out(out: Tensor, args: Arguments, problem: Problem, *, traced: bool = False) -> None:
    """Checks the buffer of the out-variant: shape, dtype, device, no gradient, and memory of its own.

    Raises:
        ValueError: wrong shape or device, an element that stands for several, or memory shared with an input.
        TypeError: wrong dtype, or not a tensor.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out is {type(out).__name__}, expected a torch.Tensor")
    require_shape("out", out, problem.out_shape, "[M, H], or [M, top_k, H] with reduce_topk=False")
    if out.dtype != problem.out_dtype:
        raise TypeError(
            f"out has dtype {out.dtype}, expected {problem.out_dtype}; allocate it so, or pass out_dtype={out.dtype}"
        )
    if out.device != args.hidden_states.device:
        raise ValueError(f"out is on {out.device}, expected {args.hidden_states.device}, where hidden_states is")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "out requires grad, and the op has no backward; pass out.detach(), or call it in torch.no_grad()"
        )
    if traced:
        return
    if may_overlap_itself(out):
        raise ValueError(
            f"out has strides {list(out.stride())} for shape {list(out.shape)}: one element may stand for several "
            "results; pass a contiguous tensor"
        )
    for name, tensor in args.tensors().items():
        if may_share(out, tensor):
            raise ValueError(f"out shares memory with {name}, which is read while out is written; pass another tensor")


def check_route(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None) -> None:
    """Checks the arguments of `moe_ops.route`.

    Raises:
        ValueError: a shape, size or device is wrong.
        TypeError: a dtype is wrong.
    """
    require_ndim("topk_ids", topk_ids, "[M, top_k]")
    require(1 <= block <= 1024, lambda: f"block is {block}, expected 1 to 1024")
    most = 2**31 // block - 1
    require(1 <= num_experts <= most, lambda: f"num_experts is {num_experts}, expected 1 to {most}")
    _check_ids(topk_ids, expert_map)
    num_routes = topk_ids.shape[0] * topk_ids.shape[1]
    _check_num_routes(num_routes, num_experts, block)


def _check_types(args: Arguments) -> None:
    for name in TENSOR_ARGUMENTS:
        value = getattr(args, name)
        if not isinstance(value, Tensor) and (value is not None or name in REQUIRED_TENSORS):
            raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")


def _check_activation(args: Arguments) -> tuple[Activation, float | None, float | None]:
    require_name("activation", args.activation, tuple(ACTIVATIONS))
    activation = ACTIVATIONS[args.activation]
    alpha, limit = args.activation_alpha, args.activation_limit
    if alpha is not None and activation.default_alpha is None:
        raise ValueError(
            f"activation_alpha is {alpha}, but activation {activation.name!r} has no slope; leave it out, or use "
            "activation='swigluoai'"
        )
    if limit is not None and not activation.takes_limit:
        raise ValueError(
            f"activation_limit is {limit}, but activation {activation.name!r} has no clamp; leave it out, or use "
            "activation='silu' or 'swigluoai'"
        )
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"activation_alpha is {alpha}, expected a finite number")
    if limit is not None and not limit > 0:
        raise ValueError(f"activation_limit is {limit}, expected a number above 0")
    return (
        activation,
        activation.default_alpha if alpha is None else alpha,
        activation.default_limit if limit is None else limit,
    )


def _check_options(args: Arguments, activation: Activation) -> None:
    require_name("path", args.path, PATHS)
    require_name("gate_up_layout", args.gate_up_layout, GATE_UP_LAYOUTS)
    require_name("quantization", args.quantization, FORMATS)
    if args.gate_up_layout == "interleaved" and not activation.gated:
        raise ValueError(
            f"gate_up_layout is 'interleaved', but activation {activation.name!r} has no gate; leave it out"
        )
    if not math.isfinite(args.routed_scaling_factor):
        raise ValueError(f"routed_scaling_factor is {args.routed_scaling_factor}, expected a finite number")
    if args.out_dtype is not None and args.out_dtype not in COMPUTE_DTYPES:
        raise TypeError(f"out_dtype is {args.out_dtype}, expected {either(COMPUTE_DTYPES)} or None")


def _check_shapes(args: Arguments, activation: Activation, scheme: Scheme) -> None:
    hidden_states, w1, w2, ids = args.hidden_states, args.w1, args.w2, args.topk_ids
    half = " / 2" if scheme.packed else ""
    for name, tensor, form in (
        (
            "hidden_states",
            hidden_states,
            "[M, H]; flatten the others: hidden_states.reshape(-1, hidden_states.shape[-1])",
        ),
        ("w1", w1, f"[E, 2 * I, H{half}] ([E, I, H{half}] for an activation that ends in '_no_gate')"),
        ("w2", w2, f"[E, H, I{half}]"),
        ("topk_ids", ids, "[M, top_k]"),
    ):
        require_ndim(name, tensor, form)
    num_tokens, hidden = hidden_states.shape
    experts, _, stored = w2.shape
    intermediate = scheme.columns(stored)
    for name, size in (
        ("hidden_states: H", hidden),
        ("w2: I", intermediate),
        ("w2: E", experts),
        ("topk_ids: top_k", ids.shape[1]),
    ):
        require(size >= 1, partial("{} is {}, expected at least 1".format, name, size))
    if scheme.packed:
        require(hidden % 2 == 0, lambda: f"hidden_states: H is {hidden}, expected an even number: w1 has two in a byte")
    factor = 2 if activation.gated else 1
    rows = "2 * I" if activation.gated else "I"
    # First: of a transposed w2 the sizes would make w1 look wrong.
    require_shape("w2", w2, (experts, hidden, stored), f"[E, H, I{half}], with H from hidden_states")
    require_shape(
        "w1",
        w1,
        (experts, factor * intermediate, hidden // 2 if scheme.packed else hidden),
        f"[E, {rows}, H{half}] for activation {activation.name!r}, with E and I from w2 {list(w2.shape)} and H from "
        f"hidden_states {list(hidden_states.shape)}",
    )
    require_shape("topk_ids", ids, (num_tokens, ids.shape[1]), "[M, top_k], with M from hidden_states")
    require_shape("topk_weights", args.topk_weights, ids.shape, "[M, top_k], as topk_ids")
    if args.w1_bias is not None:
        require_shape("w1_bias", args.w1_bias, (experts, factor * intermediate), f"[E, {rows}], the rows of w1")
    if args.w2_bias is not None:
        require_shape("w2_bias", args.w2_bias, (experts, hidden), "[E, H]")
    if scheme.quantized:
        check_scales(args, scheme, factor * intermediate)
    _check_ids(ids, args.expert_map)
    _check_num_routes(num_tokens * ids.shape[1], experts, LARGEST_BLOCK)


def _check_ids(topk_ids: Tensor, expert_map: Tensor | None) -> None:
    if topk_ids.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"topk_ids has dtype {topk_ids.dtype}, expected {either(INDEX_DTYPES)}; cast it: topk_ids.to(torch.int32)"
        )
    if expert_map is None:
        return
    require_ndim("expert_map", expert_map, "[E_global]")
    if expert_map.dtype != torch.int32:
        raise TypeError(
            f"expert_map has dtype {expert_map.dtype}, expected torch.int32; cast it: expert_map.to(torch.int32)"
        )
    if expert_map.device != topk_ids.device:
        raise ValueError(
            f"expert_map is on {expert_map.device}, expected {topk_ids.device}, where topk_ids is; move it: "
            f"expert_map.to('{topk_ids.device}')"
        )


def _check_num_routes(num_routes: int, num_experts: int, block: int) -> None:
    """Row numbers of the sorted order are int32 on the device, padding included."""
    require(
        num_routes + num_experts * block < 2**31,
        lambda: (
            f"topk_ids has M * top_k = {num_routes} routes, expected fewer than {2**31 - num_experts * block}; "
            "split the tokens over several calls"
        ),
    )


def _check_dtypes(args: Arguments, scheme: Scheme) -> torch.dtype:
    """The compute dtype."""
    dtype = args.hidden_states.dtype
    if scheme.inputs_given:
        dtype = args.out_dtype if args.out_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    elif dtype not in COMPUTE_DTYPES:
        quantized = "" if scheme.row_dtype is None else f", or {scheme.row_dtype} with a1_scale"
        cure = "" if scheme.quantized else " and the weights"
        raise TypeError(
            f"hidden_states has dtype {dtype}, expected {either(COMPUTE_DTYPES)}{quantized}; cast it{cure}: "
            "hidden_states.to(torch.bfloat16)"
        )
    for name in ("w1", "w2"):
        got = getattr(args, name).dtype
        if not scheme.quantized and got != dtype:
            cure = f"cast one of them: {name}.to({dtype}) or hidden_states.to({got})"
            if got not in COMPUTE_DTYPES:
                cure = f"pass quantization= and scales if it is quantised, or cast it: {name}.to({dtype})"
            raise TypeError(f"{name} has dtype {got}, expected {dtype}, the dtype of hidden_states; {cure}")
    for name in ("w1_bias", "w2_bias"):
        bias = getattr(args, name)
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{name} has dtype {bias.dtype}, expected {either((dtype, torch.float32))}; cast it: {name}.to({dtype})"
            )
    if not args.topk_weights.dtype.is_floating_point or args.topk_weights.dtype.itemsize == 1:
        raise TypeError(
            f"topk_weights has dtype {args.topk_weights.dtype}, expected a floating-point dtype of at least 16 bits; "
            "cast it: topk_weights.to(torch.float32)"
        )
    return dtype


def _check_devices(args: Arguments) -> None:
    device = args.hidden_states.device
    for name, tensor in args.tensors().items():
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {device}, where hidden_states is; move it: "
                f"{name}.to('{device}')"
            )
