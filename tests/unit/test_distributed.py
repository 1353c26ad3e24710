"""What expert parallelism decides without any other process: placements, costs, formats, errors, one rank alone."""

import datetime
import json
import re

import pytest
import torch
import torch.distributed as dist

import moe_ops
from moe_ops.cli import main
from moe_ops.distributed import (
    ExpertParallel,
    Network,
    Placement,
    choose_way,
    estimate,
    expected_share,
    shard_state_dict,
)
from moe_ops.distributed.cost import halving_pays
from moe_ops.distributed.formats import make_formats
from moe_ops.distributed.groups import Group
from moe_ops.exchange import RowLayout
from moe_ops.nn import MoELayer
from moe_ops.testing import random_inputs

SIZES = {"hidden_size": 2048, "top_k": 8, "row_bytes": 4224, "back_bytes": 4}


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=5))
    yield
    dist.destroy_process_group()


def group_of(size, rank=0):
    """A group without processes: for what is decided before anything is sent."""
    return Group("nobody", rank, size, torch.device("cpu"))


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (5, 2), (5, 4), (3, 4), (1, 1), (256, 48)])
def test_even_placement(experts, ranks):
    placement = Placement.even(experts, ranks)
    sizes = [len(mine) for mine in placement.experts]
    assert sum(sizes) == experts == placement.num_experts and max(sizes) - min(sizes) <= 1
    for expert, (rank, local) in enumerate(zip(placement.rank_of, placement.local_of, strict=True)):
        assert placement.experts[rank][local] == expert and placement.expert_map(rank)[expert] == local
    assert Placement.from_expert_maps([placement.expert_map(rank) for rank in range(ranks)]) == placement


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Placement(()), "experts is empty"),
        (lambda: Placement(((0, 1), (1, 2))), r"experts has 4 experts, twice \[1\], missing \[\]"),
        (lambda: Placement(((0,), (2,))), r"missing \[1\]"),
        (lambda: Placement(((0, -1),)), r"below 0 \[-1\]"),
        (lambda: Placement(((), ())), "experts has 0 experts"),
        (lambda: Placement.even(0, 2), "num_experts is 0"),
        (lambda: Placement.even(2, 0), "num_ranks is 0"),
        (lambda: Placement.from_expert_maps([[0, -1], [-1, 0, 1]]), r"lengths \[2, 3\]"),
        (lambda: Placement.from_expert_maps([[0, 0], [-1, -1]]), r"expert_maps\[0\] has local experts \[0\] for 2"),
    ],
)
def test_placement_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_share_is_what_is_drawn():
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(4000, 64, generator=generator).topk(8).indices
    drawn = (ids // 8 == 3).any(1).double().mean().item()  # rank 3 of 8
    assert abs(drawn - expected_share(8, 8)) < 0.03


def test_estimates():
    """Bytes and seconds, by hand."""
    net = Network(bandwidth=1e9, latency=1e-3, host_sync=5e-3)
    traffic = estimate("gather", 10, num_ranks=4, network=net, **SIZES)
    assert traffic.rows == 30 and traffic.out_bytes == 30 * 4224 and traffic.back_bytes == 30 * 2048 * 4
    assert traffic.seconds == pytest.approx(2e-3 + 30 * (4224 + 8192) / 1e9)
    uneven = estimate("alltoall", 10, num_ranks=4, host_sync=True, network=net, **SIZES)
    assert uneven.rows == pytest.approx(30 * (1 - 0.75**8))
    assert uneven.seconds == pytest.approx(3e-3 + 5e-3 + net.handling + uneven.rows * (4224 + 8192) / 1e9)
    even = estimate("alltoall", 10, num_ranks=4, capacity=7, network=net, **SIZES)
    assert even.rows == 21
    assert estimate("gather", 10, num_ranks=1, network=net, **SIZES).rows == 0


def test_nodes():
    """Beyond a node the slower network decides, and inside it does not."""
    net = Network(bandwidth=400e9, node_bandwidth=50e9, node_size=8)
    assert net.seconds(7e9, 8) == pytest.approx(7e9 / 400e9)
    assert net.seconds(15e9, 16) == pytest.approx(8e9 / 50e9)
    assert net.seconds(1e9, 1) == 0


def test_few_tokens_are_gathered_and_many_are_sent():
    ways = [choose_way(tokens, num_ranks=8, host_sync=True, **SIZES)[0].way for tokens in (1, 16, 8192, 32768)]
    assert ways == ["gather", "gather", "alltoall", "alltoall"]
    best, other = choose_way(1024, num_ranks=8, **SIZES)
    assert best.seconds <= other.seconds and {best.way, other.way} == {"gather", "alltoall"}
    # 16 bits for many tokens, for fewer where the network is slower, and never where the rank has slow memory.
    halved = [halving_pays(tokens, hidden_size=7168, num_ranks=8) for tokens in (1, 8, 1024)]
    assert halved == [False, False, True]
    assert halving_pays(8, hidden_size=7168, num_ranks=8, network=Network(bandwidth=20e9))
    assert not halving_pays(1024, hidden_size=7168, num_ranks=8, network=Network(memory=1e11))
    # Where every token goes everywhere there is nothing to be saved.
    assert choose_way(4096, num_ranks=2, capacity=4096, **SIZES)[0].way == "gather"


@pytest.mark.parametrize(
    "network",
    [
        {"bandwidth": 0},
        {"latency": -1},
        {"node_size": 0},
        {"node_bandwidth": float("nan")},
        {"host_sync": -1},
        {"rounding": -1},
        {"memory": 0},
    ],
)
def test_network_errors(network):
    with pytest.raises(ValueError, match=f"{next(iter(network))} is"):
        Network(**network)


FORMAT = {"payload": "auto", "combine_dtype": None, "out_dtype": None, "quantization": "none", "block_shape": None,
          "static_scale": False}  # fmt: skip


def formats(dtype, **options):
    return make_formats(torch.empty(2, 300, dtype=dtype), 4, **{**FORMAT, **options})


def test_formats():
    plain = formats(torch.bfloat16)
    assert plain.layout == RowLayout(300, 4, torch.bfloat16) and not plain.quantized
    assert (plain.partial_dtype, plain.out_dtype) == (torch.float32, torch.bfloat16)
    # Chosen by sizes where 11 bits are many; float16 of partial sums that have it is as the op writes it.
    assert plain.combine_dtype is None
    assert all(formats(dtype).combine_dtype == torch.float32 for dtype in (torch.float32, torch.float16))
    for dtype, combine, partial in (
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float32),
    ):
        asked = formats(dtype, combine_dtype=combine)
        assert (asked.combine_dtype, asked.partial_dtype) == (combine, partial)
    blocks = {"quantization": "fp8_w8a8", "block_shape": (128, 128)}
    assert formats(torch.bfloat16, **blocks).layout == RowLayout(300, 4, torch.float8_e4m3fn, 3)
    assert formats(torch.bfloat16, quantization="int8_w8a8").layout == RowLayout(300, 4, torch.int8, 1)
    assert formats(torch.bfloat16, payload="plain", **blocks).layout.dtype == torch.bfloat16
    assert formats(torch.bfloat16, quantization="int4_w4a16", block_shape=(0, 32)).layout.dtype == torch.bfloat16
    # A static scale is the receiver's, and of fp8 rows the op would not know that they were float16.
    assert not formats(torch.bfloat16, quantization="fp8_w8a8", static_scale=True).quantized
    assert not formats(torch.float16, **blocks).quantized
    assert formats(torch.float16, combine_dtype=torch.float16, **blocks).quantized
    given = formats(torch.float8_e4m3fn, static_scale=True, **blocks)
    assert given.quantized and given.given and given.out_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.bfloat16, {"payload": "fp8"}, "payload is 'fp8', expected one of"),
        (torch.bfloat16, {"payload": "quantized"}, "quantization='none' multiplies hidden states of torch.bfloat16"),
        (torch.float16, {"payload": "quantized", "quantization": "fp8_w8a8"}, "compute in torch.float16"),
        (
            torch.bfloat16,
            {"payload": "quantized", "quantization": "fp8_w8a8", "static_scale": True},
            "a1_scale is given",
        ),
        (torch.int8, {"payload": "plain", "quantization": "int8_w8a8"}, "hidden_states arrive quantised"),
        (torch.int8, {"quantization": "int8_w8a8", "out_dtype": torch.float16}, "pass combine_dtype=torch.float16"),
    ],
)  # fmt: skip
def test_format_errors(dtype, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        formats(dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("scales", [0, 1, 56])
def test_layout_does_not_overlap(dtype, scales):
    layout = RowLayout(7168, 7, dtype, scales)
    ends = [7168 * dtype.itemsize, layout.scale_offset + 4 * scales, layout.expert_offset + 28]
    ends += [layout.weight_offset + 28, layout.lost_offset + 4]
    starts = [layout.scale_offset, layout.expert_offset, layout.weight_offset, layout.lost_offset, layout.row_bytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert layout.row_bytes % 128 == layout.scale_offset % 16 == layout.expert_offset % 16 == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": None}, ValueError, "num_experts and placement are None"),
        ({"placement": Placement.even(4, 3)}, ValueError, "placement is for 3 ranks, and the group has 2"),
        ({"placement": Placement.even(5, 2)}, ValueError, "num_experts is 4, but placement has 5 experts"),
        ({"way": "a2a"}, ValueError, "way is 'a2a'"),
        ({"on_overflow": "drop"}, ValueError, "on_overflow is 'drop'"),
        ({"combine_dtype": torch.int8}, TypeError, "combine_dtype is torch.int8"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ({"capacity": 4}, ValueError, "capacity is 4, but max_tokens is None"),
        ({"capacity": 4, "max_tokens": 8, "way": "gather"}, ValueError, "capacity is 4, but way='gather'"),
    ],
)
def test_option_errors(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ExpertParallel(group_of(2), **{"num_experts": 4, **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w1": torch.ones(4, 16, 8)}, ValueError, "w1 has 4 experts, expected 2, those of rank 1: (2, 3)"),
        ({"expert_map": torch.zeros(4, dtype=torch.int32)}, ValueError, "expert_map was given"),
        ({"reduce_topk": False}, ValueError, "reduce_topk is False"),
        ({"topk_ids": torch.ones(9, 1)}, ValueError, "topk_ids has shape [9, 1]"),
        ({"topk_ids": torch.ones(5, 1)}, TypeError, "topk_ids has dtype torch.float32"),
        ({"hidden_states": torch.ones(5, 8).half()}, TypeError, "w1 has dtype torch.float32, expected torch.float16"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
        ({"hidden_states": torch.ones(5, 8, device="meta")}, ValueError, "hidden_states is on meta, expected cpu"),
    ],
)
def test_call_errors_come_before_anything_is_sent(change, error, message):
    ep = ExpertParallel(group_of(2, rank=1), 4, max_tokens=5)
    call = {"hidden_states": torch.ones(5, 8), "w1": torch.ones(2, 16, 8), "w2": torch.ones(2, 8, 8),
            "topk_weights": torch.ones(5, 1), "topk_ids": torch.zeros(5, 1, dtype=torch.int32)}  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        ep.fused_moe(**(call | change))


def test_call_errors_on_a_rank_without_experts():
    ep = ExpertParallel(group_of(2, rank=1), placement=Placement(((0, 1, 2), ())))
    call = [torch.ones(5, 8), torch.ones(0, 16, 8), torch.ones(0, 8, 8), torch.ones(5, 1), torch.ones(5, 1)]
    with pytest.raises(TypeError, match=r"topk_ids has dtype torch\.float32"):
        ep.fused_moe(*call)
    call[4] = call[4].int()
    assert ep.explain(*call, w1_bias=torch.ones(0, 16), w2_bias=torch.ones(0, 8)).op is None
    with pytest.raises(ValueError, match="w2_bias has shape"):
        ep.explain(*call, w2_bias=torch.ones(0, 9))


def test_too_many_tokens():
    ep = ExpertParallel(group_of(2), 4, max_tokens=4)
    args = random_inputs(num_tokens=5, hidden=8, intermediate=8, experts=2, top_k=1)
    with pytest.raises(ValueError, match="hidden_states has 5 tokens, expected at most max_tokens = 4"):
        ep.fused_moe(*args.tensors().values())


def test_needs_a_group():
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group"):
        ExpertParallel(None, 4)


def test_plans():
    """What `explain` says of each setting, with nobody on the other side."""
    args = random_inputs(num_tokens=64, hidden=64, intermediate=32, experts=4, top_k=2, dtype=torch.bfloat16)
    tensors = list(args.tensors().values())

    def plan(**options):
        return ExpertParallel(group_of(2), 8, **options).explain(*tensors)

    told = plan(way="alltoall")
    assert told.host_syncs == 1 and not told.capturable and told.capacity is None and told.num_rows == 96
    assert told.op.path == "cpu" and told.reason == "asked for"
    told = plan(way="alltoall", max_tokens=80)
    assert told.host_syncs == 0 and told.capturable and told.capacity == 80 and told.num_rows == 160
    told = plan(way="alltoall", max_tokens=80, capacity=70)
    assert told.host_syncs == 1 and not told.capturable and told.num_rows == 140
    told = plan(way="alltoall", max_tokens=80, capacity=70, on_overflow="error")
    assert told.host_syncs == 0 and told.capturable
    told = plan(max_tokens=64)
    assert told.way == "gather" and "gather takes about" in told.reason and told.num_rows == 128
    assert told.traffic.rows == 64 and told.traffic.back_bytes == 64 * 64 * 4
    assert (told.payload_dtype, told.combine_dtype) == (torch.bfloat16, torch.float32)
    assert plan(max_tokens=64, combine_dtype=torch.bfloat16).traffic.back_bytes == 64 * 64 * 2
    many = plan(max_tokens=65536)
    assert many.combine_dtype == torch.float16 and many.traffic.back_bytes == 65536 * 64 * 2
    assert plan(max_tokens=65536, combine_dtype=torch.float32).traffic.back_bytes == 65536 * 64 * 4
    assert not plan(max_tokens=64, check=True).capturable


def test_one_rank(alone):
    """A group of one sends nothing, and is the op."""
    args = random_inputs(num_tokens=5, hidden=16, intermediate=8, experts=4, top_k=2, dtype=torch.bfloat16)
    tensors = list(args.tensors().values())
    placement = Placement(((2, 0, 3, 1),))
    order = torch.tensor(placement.experts[0])
    ep = ExpertParallel(None, placement=placement)
    out = ep.fused_moe(tensors[0], args.w1[order], args.w2[order], *tensors[3:])
    assert torch.equal(out, moe_ops.fused_moe(*tensors))
    assert ep.explain(*tensors).way == "local"
    with pytest.raises(TypeError, match="ep_group is str"):
        ExpertParallel("ep", 4)


def test_sharded_state_dicts():
    full = MoELayer(16, 8, num_experts=5, top_k=2, bias=True, quantization="fp8_w8a8").state_dict()
    full = {f"layers.0.mlp.{name}": tensor for name, tensor in full.items()}
    placement = Placement(((0, 1), (4, 2), (3,), ()))
    for rank, mine in enumerate(placement.experts):
        sharded = shard_state_dict(full, placement, rank)
        assert sharded.keys() == full.keys()
        for name, tensor in sharded.items():
            if ".experts." not in name:
                assert tensor is full[name]
                continue
            assert tensor.shape == (len(mine), *full[name].shape[1:]) and tensor.dtype == full[name].dtype
            for got, expert in zip(tensor, mine, strict=True):
                assert torch.equal(got.float(), full[name][expert].float())
    assert sharded["layers.0.mlp.experts.w1"].shape[0] == 0
    first = shard_state_dict(full, placement, 0)
    assert first["layers.0.mlp.experts.w1"].data_ptr() == full["layers.0.mlp.experts.w1"].data_ptr()
    with pytest.raises(ValueError, match=r"experts.w1 of shape \[2, 16, 16\], expected \[5, ...\]"):
        shard_state_dict(first, placement, 0)
    with pytest.raises(ValueError, match=r"rank is 4, expected 0 .. 3"):
        shard_state_dict(full, placement, 4)


def test_traffic_command(capsys):
    assert main(["traffic", "--model", "deepseek-v3", "--gpus", "2,64", "--tokens", "16,4096", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) == 8
    faster = {(one["gpus"], one["tokens"]): one["way"] for one in layers if one["faster"]}
    assert faster[2, 16] == "gather" and faster[64, 4096] == "alltoall"
    options = ["traffic", "--model", "qwen3-30b-a3b", "--payload", "fp8", "--combine", "16", "--node-size", "8"]
    assert main([*options, "--bandwidth", "100", "--latency", "10"]) == 0
    out = capsys.readouterr().out
    assert "100 GB/s, 10 us a collective, nodes of 8, 50 GB/s between them" in out and "256" in out
    assert main([*options, "--bandwidth", "0"]) == 2 and "bandwidth is 0" in capsys.readouterr().err
    assert main(["traffic"]) == 2 and "needs a --model or a --shape" in capsys.readouterr().err
