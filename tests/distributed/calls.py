"""Calls across ranks, held against the rule of correctness of one device."""

from dataclasses import replace

import torch

from moe_ops.arguments import Arguments
from moe_ops.distributed import ExpertParallel, Placement
from moe_ops.testing import assert_correct, random_inputs

SIZES = {"hidden": 48, "intermediate": 40, "experts": 5, "top_k": 3}
_OF_EXPERTS = ("w1", "w2", "w1_bias", "w2_bias", "w1_scale", "w2_scale", "w1_zero_point", "w2_zero_point")


class Cases(dict):
    """Functions of a `Rank` by name; decorates them."""

    def __call__(self, function):
        self[function.__name__] = function
        return function


def uneven(size):
    """Tokens of each rank: one has none, and one has one."""
    return [0, 1, 7, 12][-size:] if size > 2 else [0, 9]


def of_rank(args, counts, rank):
    """The call with a rank's tokens and the weights of all experts."""
    first = sum(counts[:rank])
    tokens = slice(first, first + counts[rank])
    scale = args.a1_scale
    if scale is not None and scale.ndim == 2:
        scale = scale[tokens]
    return replace(args, hidden_states=args.hidden_states[tokens], topk_weights=args.topk_weights[tokens],
                   topk_ids=args.topk_ids[tokens], a1_scale=scale)  # fmt: skip


def of_experts(args, experts):
    """Arguments of `ExpertParallel.fused_moe`: the weights of some experts."""
    index = torch.tensor(experts, dtype=torch.int64, device=args.w1.device)

    def taken(tensor):
        return None if tensor is None else torch.stack([tensor[i] for i in index]) if experts else tensor[:0]

    tensors = {name: taken(getattr(args, name)) for name in _OF_EXPERTS}
    if args.a2_scale is not None and args.a2_scale.numel() > 1:
        tensors["a2_scale"] = taken(args.a2_scale)
    positional = (args.hidden_states, tensors.pop("w1"), tensors.pop("w2"), args.topk_weights, args.topk_ids)
    named = {name: getattr(args, name) for name in Arguments.__dataclass_fields__}
    drop = {"hidden_states", "w1", "w2", "topk_weights", "topk_ids", "expert_map", "reduce_topk", *tensors}
    return positional, {k: v for k, v in named.items() if k not in drop} | tensors


def run(me, args, counts, placement=None, **options):
    """(result of this rank, its call with all weights, the ExpertParallel)."""
    placement = placement or Placement.even(args.w2.shape[0], me.size)
    ep = ExpertParallel(None, placement=placement, **options)
    mine = of_rank(args, counts, me.rank)
    positional, named = of_experts(mine, placement.experts[me.rank])
    return ep.fused_moe(*positional, **named), mine, ep


def check(me, args, counts, placement=None, **options):
    """Runs a call and holds it against the rule."""
    out, mine, _ = run(me, args, counts, placement, **options)
    hold(out, mine)
    return out


def hold(out, mine):
    """The rule, for a rank that may have no tokens."""
    assert out.shape == mine.hidden_states.shape and out.is_contiguous()
    if len(out):
        assert_correct(out, mine, round_up_projection=mine.hidden_states.dtype != torch.float32 and not out.is_cuda)


def draw(me, counts, **options):
    """Inputs for all ranks' tokens."""
    return random_inputs(num_tokens=sum(counts), device=me.device, **{**SIZES, **options})
