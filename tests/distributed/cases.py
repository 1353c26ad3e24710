"""What each rank runs in the tests with gloo and NCCL; a case is a function of a `Rank`."""

import re
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_ops.distributed import (
    CapacityError,
    ExpertParallel,
    Network,
    Placement,
    check_agreement,
    shard_state_dict,
)
from moe_ops.nn import FusedExperts, MoELayer
from moe_ops.testing import assert_correct, exact_inputs, poisoned_memory
from tests.distributed import fault_cases, shape_cases, traced_cases
from tests.distributed.calls import SIZES, Cases, check, draw, hold, of_experts, of_rank, run, uneven
from tests.quantized import FORMATS, quantized_case

MOST = 12
WAYS = {
    "gather": {"way": "gather"},
    "gather padded": {"way": "gather", "max_tokens": MOST},
    "alltoall": {"way": "alltoall"},
    "alltoall padded": {"way": "alltoall", "max_tokens": MOST},
    "auto": {},
    "auto padded": {"max_tokens": MOST},
    "fallback": {"way": "alltoall", "max_tokens": MOST, "capacity": 2},
}
CASES = Cases(traced_cases.CASES | shape_cases.CASES | fault_cases.CASES)


@CASES
def ways(me):
    for way in WAYS.values():
        for dtype in (torch.float32, torch.bfloat16):
            with poisoned_memory():
                check(me, draw(me, uneven(me.size), dtype=dtype), uneven(me.size), **way)


@CASES
def hostile_ids(me):
    for way in WAYS.values():
        for index in (torch.int32, torch.int64):
            args = draw(me, uneven(me.size), routing="hostile", index_dtype=index)
            if index == torch.int64:
                args.topk_ids[args.topk_ids < 0] = 2**40
            with poisoned_memory():
                check(me, args, uneven(me.size), **way)


@CASES
def no_tokens(me):
    """M = 0 on every rank, and routes to nobody."""
    counts = [0] * me.size
    for way in WAYS.values():
        assert check(me, draw(me, counts), counts, **way).shape == (0, SIZES["hidden"])
    counts = uneven(me.size)
    args = draw(me, counts)
    args.topk_ids.fill_(-1)
    args.topk_weights.fill_(torch.nan)
    for way in WAYS.values():
        out, mine, _ = run(me, args, counts, **way)
        assert out.shape == mine.hidden_states.shape and (out == 0).all()


@CASES
def routings(me):
    """Skewed ones, duplicate ids, and more slots than experts."""
    counts = uneven(me.size)
    for way in ("gather", "alltoall", "alltoall padded", "fallback"):
        for routing in ("one_expert", "duplicates", "zipf"):
            check(me, draw(me, counts, routing=routing, top_k=6), counts, **WAYS[way])


@CASES
def options(me):
    counts = uneven(me.size)
    for way in ("gather padded", "alltoall"):
        check(
            me, draw(me, counts, bias=True, activation="swigluoai", gate_up_layout="interleaved"), counts, **WAYS[way]
        )
        check(me, draw(me, counts, activation="relu2_no_gate", routed_scaling_factor=2.5), counts, **WAYS[way])
        check(me, draw(me, counts, apply_router_weight_on_input=True, bias=True), counts, **WAYS[way])
        half = draw(me, counts, dtype=torch.float16, out_dtype=torch.float32)
        assert check(me, half, counts, **WAYS[way]).dtype == torch.float32


@CASES
def placements(me):
    """Experts in any order, and ranks with few of them or none."""
    counts, others = uneven(me.size), list(range(me.size - 1))
    of_one = Placement((*((),) * (me.size - 1), (4, 2, 0, 1, 3)))
    mixed = Placement(((4, 1), *((expert,) for expert in (0, 2, 3)[: me.size - 2]), (0, 2, 3)[me.size - 2 :]))
    few = Placement(((1,), (0,), *((),) * len(others[1:])))
    maps = [mixed.expert_map(rank) for rank in range(me.size)]
    assert Placement.from_expert_maps(maps) == mixed
    for way in WAYS.values():
        for placement in (of_one, mixed):
            check(me, draw(me, counts), counts, placement, **way)
        check(me, draw(me, counts, experts=2), counts, few, **way)


@CASES
def exact(me):
    """Every value an integer: bit for bit the op of one process."""
    counts = uneven(me.size)
    args = exact_inputs(num_tokens=sum(counts), dtype=torch.bfloat16, device=me.device, **SIZES)
    expected = of_rank(args, counts, me.rank)
    expected = torch.ops.moe_ops.fused_moe_tma(*(getattr(expected, n) for n in
        ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")))  # fmt: skip
    for way in WAYS.values():
        for back in (None, torch.bfloat16):
            out, _, _ = run(me, args, counts, combine_dtype=back, **way)
            assert torch.equal(out, expected)


@CASES
def repeated(me):
    counts = uneven(me.size)
    for way in WAYS.values():
        first, second = (run(me, draw(me, counts, dtype=torch.bfloat16), counts, **way)[0] for _ in range(2))
        assert torch.equal(first, second)


def _formats(me, names):
    counts = uneven(me.size)
    for name in names:
        for way in ("gather padded", "alltoall", "alltoall padded"):
            args = quantized_case(name, torch.bfloat16, me.device, num_tokens=sum(counts), experts=5, top_k=3)
            with poisoned_memory():
                quantized = check(me, args, counts, **WAYS[way])
            if FORMATS[name]["quantization"].endswith("w8a8") and not FORMATS[name].get("inputs_given"):
                # The sender quantises as the op would: the same bits, in half the bytes.
                assert torch.equal(quantized, check(me, args, counts, payload="plain", **WAYS[way]))


@CASES
def formats(me):
    _formats(me, ("fp8_block", "fp8_channel", "fp8_block_given", "fp8_given_tensor", "int8_channel", "int4"))


@CASES
def all_formats(me):
    _formats(me, FORMATS)


@CASES
def payload_bytes(me):
    """Half the bytes, and the scales, travel."""
    args = of_rank(quantized_case("fp8_block", torch.bfloat16, num_tokens=4 * me.size, hidden=256, experts=5),
                   [4] * me.size, me.rank)  # fmt: skip
    told = {}
    for payload in ("auto", "plain"):
        ep = ExpertParallel(None, 5, way="alltoall", payload=payload)
        positional, named = of_experts(args, ep.local_experts)
        told[payload] = ep.explain(*positional, **named)
    assert told["auto"].payload_dtype == torch.float8_e4m3fn and told["plain"].payload_dtype == torch.bfloat16
    # 256 values, 2 scales, then experts, weights and a flag; in whole units of 128 bytes.
    assert told["auto"].traffic.out_bytes / told["auto"].traffic.rows == 384
    assert told["plain"].traffic.out_bytes / told["plain"].traffic.rows == 640


@CASES
def rounded_partial_sums(me):
    """With combine_dtype=bfloat16 each rank's partial sum is rounded once more: seen, and bounded by the roundings."""
    counts = [40] * me.size
    args = draw(me, counts, dtype=torch.bfloat16, experts=8, top_k=6)
    sent, mine, _ = run(me, args, counts, way="alltoall", combine_dtype=torch.bfloat16)
    whole, _, _ = run(me, args, counts, way="alltoall")
    assert_correct(whole, mine, round_up_projection=True)
    assert not torch.equal(sent, whole)
    # Half a unit in the last place of each partial sum, of which none is above the sum of the routes' sizes.
    routes = torch.ops.moe_ops.fused_moe_tma(*mine.tensors().values(), reduce_topk=False, out_dtype=torch.float32)
    bound = 2**-8 * routes.abs().sum(1) + 2**-8 * whole.float().abs()
    assert ((sent.float() - whole.float()).abs() <= bound).all()


@CASES
def halved_partial_sums(me):
    """With combine_dtype=float16 the rule of one device holds, also for numbers that float16 does not have."""
    counts = uneven(me.size)
    for way in ("gather", "gather padded", "alltoall", "alltoall padded", "fallback"):
        for options in ({"routing": "hostile"}, {"top_k": 6, "routing": "duplicates"}):
            args = draw(me, counts, dtype=torch.bfloat16, **options)
            for scale in (1.0, 1e6, 1e-9):
                args.topk_weights.mul_(scale)
                with poisoned_memory():
                    out = check(me, args, counts, combine_dtype=torch.float16, **WAYS[way])
                assert torch.equal(out, run(me, args, counts, combine_dtype=torch.float16, **WAYS[way])[0])
            # By the estimate, on a network so slow that bytes are all that counts.
            again = run(me, args, counts, network=Network(bandwidth=1.0), **WAYS[way])[0]
            assert torch.equal(again, out)
        # A token whose sums overflow even in float32 stays alone with that.
        args.hidden_states[-1] = torch.inf
        out = run(me, args, counts, combine_dtype=torch.float16, **WAYS[way])[0]
        last = me.rank == me.size - 1
        assert out[: len(out) - last].isfinite().all() and not (last and out[-1].isfinite().any())


@CASES
def capacity(me):
    """Too little of it: NaN for the tokens without room and for nobody else, and an error on every rank."""
    counts = [6] * me.size
    args = draw(me, counts, routing="one_expert", dtype=torch.bfloat16)
    options = {"way": "alltoall", "max_tokens": 6, "on_overflow": "error"}
    with poisoned_memory():
        out, mine, ep = run(me, args, counts, capacity=2, **options)
        whole, _, enough = run(me, args, counts, capacity=6, **options)
    hold(whole, mine)
    assert torch.equal(out[:2], whole[:2]) and out[2:].isnan().all()
    enough.raise_on_overflow()
    try:
        ep.raise_on_overflow()
    except CapacityError as error:
        assert f"capacity is 2, and {4 * me.size} rows" in str(error)
    else:
        raise AssertionError("no error")
    ep.raise_on_overflow()  # counted from anew


@CASES
def capacity_on_one_rank(me):
    """One rank alone runs out of room: the others know, too, and with "fallback" all of them run again."""
    counts = [6] * me.size
    args = draw(me, counts)
    args.topk_ids[:6] = 0  # only the tokens of rank 0 go all to one rank
    args.topk_ids[6:] = torch.arange(6 * (me.size - 1), device=me.device)[:, None] % 5
    options = {"way": "alltoall", "max_tokens": 6, "capacity": 5}
    _, _, ep = run(me, args, counts, on_overflow="error", **options)
    assert ep.overflow.item() == 1
    check(me, args, counts, on_overflow="fallback", **options)


@CASES
def meshes(me):
    """A dimension of a larger mesh, whose other one has other tokens."""
    counts = uneven(me.size)
    if me.size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        sub, counts = mesh["ep"], [3, 5]
        for bad in (mesh, "ep"):
            try:
                ExpertParallel(bad, 5)
            except (ValueError, TypeError) as error:
                assert "ep_group is" in str(error)
            else:
                raise AssertionError("no error")
        rank, seed = sub.get_local_rank(), mesh["dp"].get_local_rank()
    else:
        sub, rank, seed = init_device_mesh("cpu", (me.size,)), me.rank, 0
    for group in (sub, sub.get_group()):
        ep = ExpertParallel(group, 5, way="alltoall")
        assert ep.group.rank == rank
        mine = of_rank(draw(me, counts, seed=seed), counts, rank)
        positional, named = of_experts(mine, ep.local_experts)
        hold(ep.fused_moe(*positional, **named), mine)


@CASES
def beside_fsdp(me):
    """Dense layers sharded over all ranks, experts over one dimension of a mesh and over all of it."""
    from torch.distributed.fsdp import fully_shard

    shape, names = ((2, 2), ("dp", "ep")) if me.size == 4 else ((1, me.size), ("dp", "ep"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for group in (mesh["ep"], dist.group.WORLD):
        torch.manual_seed(0)
        whole = torch.nn.Sequential(torch.nn.Linear(48, 48), MoELayer(48, 32, num_experts=5, top_k=2))
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(48, 48), MoELayer(48, 32, num_experts=5, top_k=2, ep_group=group))
        ep = model[1].experts.ep
        model.load_state_dict(shard_state_dict(whole.state_dict(), ep.placement, ep.group.rank))
        fully_shard(model[0], mesh=mesh["dp"] if me.size == 4 else mesh["ep"])
        assert model[0].weight.to_local().shape[0] == 24
        x = torch.randn(3 + me.rank, 48)
        with torch.no_grad():
            torch.testing.assert_close(model(x), whole(x), rtol=1e-5, atol=1e-6)


@CASES
def layers(me):
    """MoELayer with a state dict of all experts; uneven, quantised, with a shared expert."""
    torch.manual_seed(0)
    make = {"hidden_size": 48, "intermediate_size": 32, "num_experts": 5, "top_k": 2, "device": me.device}
    options = {"renormalize": True, "shared_intermediate_size": 16, "bias": True}
    whole = MoELayer(**make, **options)
    x = torch.randn(2, 3 + me.rank, 48, device=me.device)
    placement = Placement(((4, 0), *((e,) for e in (1, 2, 3)[: me.size - 2]), (1, 2, 3)[me.size - 2 :]))
    for quantization in (None, "int4_w4a16"):
        more = {}
        if quantization:
            whole.experts.quantize_(quantization, block_shape=(0, 32))
            more = {"quantization": quantization, "block_shape": (0, 32)}
        for ep_group in (None, ExpertParallel(None, placement=placement, way="alltoall")):
            layer = MoELayer(**make, **options, **more, ep_group=ep_group or dist.group.WORLD)
            ep = layer.experts.ep
            layer.load_state_dict(shard_state_dict(whole.state_dict(), ep.placement, me.rank))
            assert layer.experts.w1.shape[0] == len(ep.local_experts)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), whole(x), rtol=1e-5, atol=1e-6)
            assert layer.experts.explain(6, 2).way in ("gather", "alltoall")
    assert f"of 5 experts, rank {me.rank} of {me.size}" in repr(layer.experts)
    experts = FusedExperts(5, 48, 32, ep_group=dist.group.WORLD, device=me.device)
    experts.load_state_dict(shard_state_dict(FusedExperts(5, 48, 32).state_dict(), experts.ep.placement, me.rank, ""))
    out = layer(x.requires_grad_())
    try:
        out.sum().backward()
    except NotImplementedError as error:
        assert "no backward" in str(error)
    else:
        raise AssertionError("a backward ran")


@CASES
def disagreements(me):
    """Named on every rank, before a collective could hang."""
    counts = [3] * me.size
    last = me.size - 1
    args = draw(me, counts)

    def wrong(pattern, change=None, **options):
        start = time.monotonic()
        call = args if me.rank != last or change is None else change
        try:
            run(me, call, counts, check=True, **options)
        except ValueError as error:
            assert re.search(pattern, str(error)), error
        else:
            raise AssertionError(f"no error like {pattern}")
        assert time.monotonic() - start < 5

    check(me, args, counts, check=True)
    others = draw(me, counts, dtype=torch.float16)
    wrong(rf"hidden_states is \[M, 48\] torch.float32 on rank 0.* and \[M, 48\] torch.float16 on rank {last}", others)
    wrong(r"hidden_states is \[M, 48\].* and \[M, 32\]", draw(me, counts, hidden=32))
    wrong(r"topk_ids is \[M, 3\] on rank 0.* and \[M, 2\] on rank", draw(me, counts, top_k=2))
    wrong("routed_scaling_factor is 1.0 on rank 0.* and 2.0", draw(me, counts, routed_scaling_factor=2.0))
    wrong("way is alltoall on rank 0 and gather on rank 1", way="gather" if me.rank else "alltoall")
    wrong("max_tokens is 4 on rank 0 and 5", max_tokens=4 if me.rank == 0 else 5)
    placement = Placement(((4, 3, 2), (1, 0), *((),) * (me.size - 2))) if me.rank else None
    wrong(r"placement is \(\(", placement=placement)
    broken = draw(me, counts)
    broken.topk_ids = broken.topk_ids.float()
    wrong(rf"rank {last}: TypeError: topk_ids has dtype torch.float32.*; no rank has sent anything", broken)
    try:
        check_agreement(None, {"a": 1, "b": me.rank})
    except ValueError as error:
        assert "a is" not in str(error) and "b is 0 on rank 0 and 1 on rank 1" in str(error)
    else:
        raise AssertionError("no error")
