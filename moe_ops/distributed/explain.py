"""What `ExpertParallel.explain` says."""

from dataclasses import replace
from typing import TYPE_CHECKING

from moe_ops.arguments import Arguments
from moe_ops.devices import describe
from moe_ops.dispatch import Plan, make_plan
from moe_ops.distributed.cost import estimate, expected_share
from moe_ops.distributed.formats import Formats
from moe_ops.distributed.plan import DistributedPlan
from moe_ops.problem import make_problem

if TYPE_CHECKING:
    from moe_ops.distributed.experts import ExpertParallel


def explain(ep: "ExpertParallel", formats: Formats, args: Arguments) -> DistributedPlan:
    """The plan of a checked call."""
    size, num_tokens = ep.group.size, args.hidden_states.shape[0]
    most = num_tokens if ep.room is None else ep.room.max_tokens
    way, reason = ("local", "the group has one rank") if size == 1 else ep.choose(formats, most)
    capacity = ep.room.capacity if way == "alltoall" and ep.room is not None else None
    flag = capacity is not None and capacity < most and ep.on_overflow == "fallback"
    syncs = 0 if size == 1 else int(ep.room is None) + int(flag)
    num_rows = size * most
    if way == "local":
        num_rows = num_tokens
    elif capacity is not None:
        num_rows = size * capacity
    elif way == "alltoall":
        num_rows = round(num_rows * expected_share(formats.layout.top_k, size))
    sizes = ep.sizes(formats, most) | {"capacity": capacity, "host_sync": ep.room is None and size > 1}
    traffic = estimate("gather" if way == "local" else way, most, **sizes)
    return DistributedPlan(
        way=way,
        reason=reason,
        num_rows=num_rows,
        capacity=capacity,
        host_syncs=syncs,
        capturable=syncs == 0 and not ep.check,
        payload_dtype=args.hidden_states.dtype if way == "local" else formats.layout.dtype,
        combine_dtype=formats.out_dtype if way == "local" else ep.combined_in(formats, most),
        traffic=traffic,
        op=_op_plan(ep, way, num_rows, formats, args),
    )


def _op_plan(ep: "ExpertParallel", way: str, num_rows: int, formats: Formats, args: Arguments) -> Plan | None:
    if not ep.local_experts:
        return None
    problem = make_problem(replace(args, expert_map=ep.expert_map))
    problem = replace(problem, num_tokens=num_rows)
    if way != "local":
        scheme = replace(problem.scheme, inputs_given=formats.quantized) if formats.quantized else problem.scheme
        problem = replace(problem, out_dtype=formats.partial_dtype, scheme=scheme)
    return make_plan(problem, describe(args.hidden_states.device))
