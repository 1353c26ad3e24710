"""Registers the ops: schemas, fakes, and implementations per dispatch key. Kernels are imported at their first use.

The C++ library (`csrc_stubs/`) may have been loaded before. Its schemas and kernels then stay, and Python adds what it
does not have; loaded afterwards, it adds nothing. Whoever comes first is so whose kernels run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_ops.dispatch import Plan
from moe_ops.plans import plan
from moe_ops.problem import Arguments, Problem, check_out, check_route, make_problem
from moe_ops.router import empty_choice, make_router, topk_route_in_torch
from moe_ops.routing import Routing, empty_routing
from moe_ops.schema import FUSED_MOE, FUSED_MOE_, NAMESPACE, NO_BACKWARD, ROUTE, TOPK_ROUTE

# Kept alive here: the ops vanish with the object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _define(schema: str) -> None:
    """Defines an op, unless one with this very schema is there: defining it twice is an error."""
    name = f"{NAMESPACE}::{schema.split('(')[0]}"
    try:
        found = torch._C._get_schema(name, "")
    except RuntimeError:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        return
    expected = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    if str(found) != str(expected):
        raise ImportError(
            f"{name} is registered already, as {found}, expected {expected}: a C++ library of another version of "
            "moe_ops has been loaded; build it again from the sources of this version"
        )


def _implement(name: str, function: Callable, key: str) -> bool:
    """Registers an implementation, unless the C++ library's is there; says whether it did."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return False
    _library.impl(name, function, key)
    return True


for _schema in (FUSED_MOE, FUSED_MOE_, ROUTE, TOPK_ROUTE, NO_BACKWARD):
    _define(_schema)


def _run(args: Arguments, problem: Problem, plan: Plan, out: Tensor) -> None:
    if problem.num_tokens == 0:
        return
    if plan.path == "tma":
        from moe_ops.backends import tma

        tma.run(args, problem, plan, out)
    elif plan.path == "classic":
        from moe_ops.backends import classic

        classic.run(args, problem, plan, out)
    elif plan.path == "cpu":
        from moe_ops.backends import cpu

        cpu.run(args, problem, out)
    else:
        from moe_ops.reference import fused_moe_reference

        out.copy_(fused_moe_reference(args))


def _fused_moe(*args, **kwargs) -> Tensor:
    arguments = Arguments(*args, **kwargs)
    problem, chosen = plan(arguments)
    out = arguments.hidden_states.new_empty(problem.out_shape, dtype=problem.out_dtype)
    _run(arguments, problem, chosen, out)
    return out


def _fused_moe_(out: Tensor, *args, **kwargs) -> None:
    arguments = Arguments(*args, **kwargs)
    problem, chosen = plan(arguments)
    check_out(out, arguments, problem)
    # Autograd has no kernel of ours here and would record what the backend does with weights that require grad.
    with torch.no_grad():
        _run(arguments, problem, chosen, out)
    torch.autograd.graph.increment_version(out)


def _fused_moe_fake(*args, **kwargs) -> Tensor:
    arguments = Arguments(*args, **kwargs)
    problem = make_problem(arguments, traced=True)
    return arguments.hidden_states.new_empty(problem.out_shape, dtype=problem.out_dtype)


def _fused_moe_fake_(out: Tensor, *args, **kwargs) -> None:
    arguments = Arguments(*args, **kwargs)
    check_out(out, arguments, make_problem(arguments, traced=True), traced=True)


def _route_fake(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    check_route(topk_ids, num_experts, block, expert_map)
    return tuple(empty_routing(topk_ids, num_experts, block))


def _route_cuda(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    check_route(topk_ids, num_experts, block, expert_map)
    from moe_ops.backends.routing import sort_routes

    return tuple(sort_routes(topk_ids, num_experts, block, expert_map))


def _route_cpu(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    check_route(topk_ids, num_experts, block, expert_map)
    from moe_ops.backends.cpu import sort_routes

    return tuple(sort_routes(topk_ids, num_experts, block, expert_map))


def _topk_route_fake(logits: Tensor, top_k: int, correction_bias: Tensor | None = None, **options):
    return empty_choice(logits, make_router(logits, top_k, correction_bias, **options))


def _topk_route_cuda(logits: Tensor, top_k: int, correction_bias: Tensor | None = None, **options):
    router = make_router(logits, top_k, correction_bias, **options)
    from moe_ops.backends.topk import topk_route

    return topk_route(logits, correction_bias, router)


def _topk_route_cpu(logits: Tensor, top_k: int, correction_bias: Tensor | None = None, **options):
    return topk_route_in_torch(logits, correction_bias, make_router(logits, top_k, correction_bias, **options))


_ROUTER_HAS_NO_BACKWARD = (
    "moe_ops.topk_route has no backward: it is for inference. Call it under torch.no_grad() or torch.inference_mode(); "
    "to train a router, compute its weights with torch's own operators"
)


def _no_router_backward(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(_ROUTER_HAS_NO_BACKWARD)


_HAS_NO_BACKWARD = (
    "moe_ops.fused_moe_tma has no backward: it is for inference. Call it under torch.no_grad() or "
    "torch.inference_mode(), or give it inputs that do not require grad; to train, use an implementation with a "
    "backward, such as experts_implementation='grouped_mm' in transformers"
)


def _no_backward(grad: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    raise NotImplementedError(_HAS_NO_BACKWARD)


class _Forward(torch.autograd.Function):
    """A forward whose backward raises."""

    @staticmethod
    def forward(ctx, tensors: tuple, options: dict, *needing: Tensor) -> Tensor:
        # Sizes instead of tensors: nothing is kept alive for a gradient that will not be computed.
        ctx.likes = [(x.shape, x.dtype) for x in needing]
        return _fused_moe_below_autograd(tensors, options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A formula that raises here would break the tracing of a compiled forward; this one raises when it runs.
        grads = (
            torch.ops.moe_ops._no_backward(grad, *like) if needed else None
            for like, needed in zip(ctx.likes, ctx.needs_input_grad[2:], strict=True)
        )
        return None, None, *grads


# Types of devices on which the op is `_fused_moe`.
_OURS = set()
# `_Forward.apply` less what it does for transforms of torch.func, which do not get there.
_apply_forward = super(torch.autograd.Function, _Forward).apply


# Sets of dispatch keys seen in a call's first tensor: whether they are an ordinary tensor's on a device of `_OURS`.
_plain_keys: dict[int, bool] = {}


def _keys(x: Tensor) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


def _are_plain(keys: int, device: torch.device) -> bool:
    """Whether tensors with these keys are no subclass, no wrapper of a transform, not negated lazily, not sparse."""
    return device.type in _OURS and keys == _keys(torch.empty(0, device=device))


def _fused_moe_below_autograd(tensors: Sequence[Tensor | None], options: dict) -> Tensor:
    """The op below autograd: our kernel itself where nothing else can want the call, which saves a dispatch."""
    # Without hidden states the checks behind the dispatcher say so.
    plain = tensors[0] is not None and not torch._C._len_torch_dispatch_stack()
    if plain:
        first = _keys(tensors[0])
        if first not in _plain_keys:
            _plain_keys[first] = _are_plain(first, tensors[0].device)
        plain = _plain_keys[first]
        for x in tensors:
            plain = plain and (x is None or _keys(x) == first)
    with torch._C._AutoDispatchBelowAutograd():
        return (_fused_moe if plain else torch.ops.moe_ops.fused_moe_tma.default)(*tensors, **options)


def _fused_moe_autograd(*tensors: Tensor | None, **options) -> Tensor:
    # What `torch.library.register_autograd` would put here reads the schema again in every call that requires grad,
    # which takes longer than the kernels of a small one.
    needing = ()
    if torch.is_grad_enabled():
        needing = [x for x in tensors if x is not None and x.requires_grad]
    if needing and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_HAS_NO_BACKWARD)
    if needing:
        return _apply_forward(tensors, options, *needing)
    return _fused_moe_below_autograd(tensors, options)


for _key in ("CPU", "CUDA"):
    if _implement("fused_moe_tma", _fused_moe, _key):
        _OURS.add(_key.lower())
    _implement("fused_moe_tma_", _fused_moe_, _key)
_library.impl("fused_moe_tma", _fused_moe_autograd, "Autograd")
_implement("route", _route_cpu, "CPU")
_implement("route", _route_cuda, "CUDA")
_implement("topk_route", _topk_route_cpu, "CPU")
_implement("topk_route", _topk_route_cuda, "CUDA")
_implement("_no_backward", _no_backward, "CompositeExplicitAutograd")

torch.library.register_fake(f"{NAMESPACE}::fused_moe_tma", _fused_moe_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::fused_moe_tma_", _fused_moe_fake_, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::route", _route_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::topk_route", _topk_route_fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::topk_route", _no_router_backward, lib=_library)
torch.library.register_fake(
    f"{NAMESPACE}::_no_backward", lambda grad, size, dtype: grad.new_empty(size, dtype=dtype), lib=_library
)
