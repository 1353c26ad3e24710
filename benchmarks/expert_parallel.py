"""Expert parallelism on the GPUs of one host, beside one GPU: python benchmarks/expert_parallel.py [--json FILE]

Every GPU has its share of the experts and M tokens of its own. Against it stands one GPU that has all experts: with all
the tokens (W * M: the same work), and with M of them. All are timed in turns; a time is the median over the rounds of
the slowest rank's. Printed for each shape and M:

* whole: a call of each way, in a CUDA graph where one can hold it; `uneven` is the all-to-all with a host sync;
* comm: its collectives alone, of the same sizes; experts: this rank's experts alone, on the rows that arrive; rest:
  what is left, which is packing, summing, and what these cost beside each other;
* speed-up: tokens per second of all GPUs over those of one that has W * M tokens, or M;
* rule: the largest of error over bound, by the rule of correctness of one device (below 1: right), over the first
  tokens of every rank; bits: whether a second call gave the same.

First come the host's times of eager calls, without and beside CUDA graphs that have collectives, and the collectives
for themselves, which gives the bandwidth and the latency that the cost model predicts with. NVLink multicast stays off.
Without GPUs it runs with gloo and a tiny shape, to see that it does.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

# Before NCCL starts.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from rank_tables import host_table, network_table, ranks_table
from record import head as facts_of
from record import write

import moe_ops
from moe_ops.arguments import Arguments
from moe_ops.distributed import ExpertParallel
from moe_ops.distributed.calls import Call
from moe_ops.distributed.ops import ep_combine, ep_halve, ep_place
from moe_ops.reference import fused_moe_reference
from moe_ops.testing import emulate, errors

# (E, top_k, H, I) of the published configurations.
SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "deepseek-v3": (256, 8, 7168, 2048), "tiny": (6, 2, 128, 64)}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMATS = ("bf16", "fp8_block")
SETS, CHECKED = 4, 48
# Ways of which the parts are timed, too.
PARTS = ("gather", "gather, float32 back", "alltoall")
POOL = {}
SIZES = [1 << n for n in (range(12, 29, 2) if CUDA else (12, 14, 16))]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024, 4096], help="M of each rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gpus", type=int, default=None, help="(default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers there, after every cell")
    parser.add_argument("--report", type=Path, help="print what such a file has instead; needs no GPU")
    return parser.parse_args()


def weights(experts: list[int], sizes: tuple[int, ...], form: str) -> dict[str, object]:
    """Weights of some experts, each drawn from a seed of its own; as arguments of the op."""
    _, _, hidden, intermediate = sizes
    made = {"w1": [], "w2": []}
    generator = torch.Generator(DEVICE)
    for expert in experts:
        generator.manual_seed(expert)
        for name, shape in (("w1", (2 * intermediate, hidden)), ("w2", (hidden, intermediate))):
            # As unit rows in bf16; in fp8 as numbers of the size of 1, with the rest in the scales.
            drawn = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
            made[name].append(drawn.to(torch.float8_e4m3fn) if form == "fp8_block" else drawn.mul_(shape[1] ** -0.5))
    stacked = {name: torch.stack(parts) for name, parts in made.items()}
    if form == "fp8_block":
        for name, weight in list(stacked.items()):
            blocks = weight.shape[0], -(-weight.shape[1] // 128), -(-weight.shape[2] // 128)
            stacked[f"{name}_scale"] = torch.full(blocks, weight.shape[2] ** -0.5, device=DEVICE)
        stacked |= {"quantization": "fp8_w8a8", "block_shape": (128, 128)}
    return stacked


def inputs(rank: int, num_tokens: int, sizes: tuple[int, ...], index: int) -> tuple[torch.Tensor, ...]:
    """Tokens, weights and experts of a rank; the same wherever they are drawn."""
    generator = torch.Generator(DEVICE).manual_seed(1000 * index + rank)
    options = {"device": DEVICE, "generator": generator}
    x = torch.randn(num_tokens, sizes[2], **options).to(torch.bfloat16)
    ids = torch.rand(num_tokens, sizes[0], **options).topk(sizes[1]).indices.to(torch.int32)
    topk_weights = torch.rand(num_tokens, sizes[1], **options) + 0.1
    return x, topk_weights / topk_weights.sum(1, keepdim=True), ids


def captured(call, sets):
    """A call on each set of inputs as a function of the set's number, in CUDA graphs that share their memory."""
    if not CUDA:
        return eager(call, sets)
    pool = POOL.setdefault("pool", torch.cuda.graph_pool_handle())
    graphs = []
    for given in sets:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(*given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events meanwhile, on a thread of its own.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            call(*given)
        graphs.append(graph)

    # A graph keeps nothing alive that it reads: not the inputs, and not the tables of an `ExpertParallel`.
    def replay(index, kept=(call, sets)):
        graphs[index % len(graphs)].replay()

    return replay


def eager(call, sets):
    """The same without a graph."""
    call(*sets[0])
    return lambda index: call(*sets[index % len(sets)])


def seconds(run, calls: int) -> float:
    """Of one call on this rank, in a row of calls."""
    dist.barrier()
    if not CUDA:
        begun = time.perf_counter()
        for index in range(calls):
            run(index % SETS)
        return (time.perf_counter() - begun) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for index in range(calls):
        run(index % SETS)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls / 1e3


def time_all(runs: dict, rounds: int) -> dict[str, float]:
    """Seconds of a call by name: the median over the rounds of the slowest rank's; None in `runs`: not this rank's."""
    taken = {name: [] for name in runs}
    for run in runs.values():
        if run is not None:
            run(0)
    for _ in range(rounds):
        for name, run in runs.items():
            mine = torch.zeros(1, device=DEVICE)
            if run is None:
                dist.barrier()
            else:
                mine.fill_(seconds(run, 8))
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            taken[name].append(mine.item())
    return {name: statistics.median(values) for name, values in taken.items()}


def network(rounds: int) -> dict:
    """Times of collectives by their bytes."""
    size, group = dist.get_world_size(), dist.group.WORLD.group_name
    ops = torch.ops._c10d_functional
    table = {"all_to_all": {}, "all_gather": {}, "reduce_scatter": {}}
    for nbytes in SIZES:
        x = torch.zeros(size, nbytes // 4, device=DEVICE)
        sets = [(x.clone(),) for _ in range(SETS)]
        ones = [1] * size
        runs = {
            "all_to_all": captured(lambda x: ops.wait_tensor(ops.all_to_all_single(x, ones, ones, group)), sets),  # noqa: B023
            "all_gather": captured(lambda x: ops.wait_tensor(ops.all_gather_into_tensor(x[0], size, group)), sets),
            "reduce_scatter": captured(
                lambda x: ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", size, group)), sets
            ),
        }
        for name, taken in time_all(runs, rounds).items():
            table[name][nbytes] = taken
    return table


def host_costs(rounds: int) -> dict[str, float]:
    """Seconds of the host for an eager call of each way, and for its parts: of each the fastest of some rounds."""
    size, tokens, calls, sizes = dist.get_world_size(), 16, 16, (64, 8, 512, 256)
    if not CUDA:
        tokens, calls, sizes = 2, 1, SHAPES["tiny"]
    x, topk_weights, ids = inputs(dist.get_rank(), tokens, sizes, 0)
    w = weights(list(ExpertParallel(None, sizes[0]).local_experts), sizes, "bf16")
    of_way = {name: ExpertParallel(None, sizes[0], **options) for name, options in ways_of(tokens).items()}
    ep = of_way["alltoall"]
    call = Call(x, w["w1"], w["w2"], topk_weights, ids, formats=ep._checked(x, w["w1"], w["w2"], topk_weights, ids, {}),
                ep=ep, arguments={})  # fmt: skip
    group, even = ep.group, [tokens] * size
    placed = ep_place(ids, ep.rank_of, ep.local_of, size, tokens)
    payload = call.pack(placed, size * tokens, tokens)
    partial = call.experts_on(payload)
    runs = {
        name: (lambda way=way: way.fused_moe(x, w["w1"], w["w2"], topk_weights, ids)) for name, way in of_way.items()
    }
    runs |= {
        "checks": lambda: ep._checked(x, w["w1"], w["w2"], topk_weights, ids, {}),
        "place": lambda: ep_place(ids, ep.rank_of, ep.local_of, size, tokens),
        "pack": lambda: call.pack(placed, size * tokens, tokens),
        "experts": lambda: call.experts_on(payload),
        "combine": lambda: ep_combine(partial, placed[2], sizes[2], torch.bfloat16),
        "all-to-all, equal splits": lambda: group.all_to_all(payload, even, even, ""),
        "all-gather": lambda: group.all_gather(payload, ""),
        "reduce-scatter": lambda: group.reduce_scatter(partial, ""),
    }
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            dist.barrier()
            if CUDA:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(calls):
                run()
            taken = (time.perf_counter() - begun) / calls
            best[name] = min(best[name], taken) if turn else best[name]
    return best


def rule(out: torch.Tensor, args: Arguments, found: dict) -> float:
    """The largest of error over bound; the oracle and the emulator are computed once per cell."""
    if not found:
        found["reference"] = fused_moe_reference(args)
        found["allowed"] = errors(emulate(args, round_up_projection=not CUDA), found["reference"])
    got, allowed = errors(out, found["reference"]), found["allowed"]
    sampling = 1 + 2 / out.numel() ** 0.5
    return max(got.rms / (1.15 * sampling * allowed.rms), got.max / (2 * sampling * allowed.max))


def ways_of(num_tokens: int) -> dict[str, dict]:
    """The options of every way that is timed."""
    exact, rounded = {"combine_dtype": torch.float32}, {"combine_dtype": torch.bfloat16}
    made = {}
    for way in ("gather", "alltoall"):
        options = {"way": way, "max_tokens": num_tokens}
        made |= {way: options, f"{way}, float32 back": options | exact, f"{way}, bfloat16 back": options | rounded}
    return made | {"alltoall, uneven": {"way": "alltoall"}}


def cell(shape: str, form: str, num_tokens: int, mine: dict, whole: dict | None, rounds: int) -> dict:
    """All ways of one shape and M."""
    rank, size = dist.get_rank(), dist.get_world_size()
    experts = SHAPES[shape][0]
    sets = [inputs(rank, num_tokens, SHAPES[shape], index) for index in range(SETS)]
    w = {name: mine[name] for name in ("w1", "w2")}
    named = {name: value for name, value in mine.items() if name not in w}
    ways = ways_of(num_tokens)
    runs, outputs, repeats, plans = {}, {}, {}, {}
    for name, options in ways.items():
        ep = ExpertParallel(None, experts, **options)

        def call(x, topk_weights, ids, ep=ep):
            return ep.fused_moe(x, w["w1"], w["w2"], topk_weights, ids, **named)

        outputs[name] = call(*sets[0]).clone()
        repeats[name] = torch.equal(call(*sets[0]), outputs[name])
        plans[name] = ep.explain(sets[0][0], w["w1"], w["w2"], *sets[0][1:], **named)
        runs[name] = (captured if options.get("max_tokens") else eager)(call, sets)
        if name in ("gather", "alltoall"):
            runs[f"{name}, eager"] = eager(call, sets)
        runs |= parts(name, ep, w, named, sets) if name in PARTS else {}
    everything = [[inputs(r, num_tokens, SHAPES[shape], index) for r in range(size)] for index in range(SETS)]
    for label, ranks in (("one GPU, W * M", range(size)), ("one GPU, M", range(1))):
        runs[label] = None
        if whole is not None:
            joined = [tuple(torch.cat([given[r][i] for r in ranks]) for i in range(3)) for given in everything]

            def alone(x, topk_weights, ids):
                more = {name: value for name, value in whole.items() if name not in w}
                return moe_ops.fused_moe(x, whole["w1"], whole["w2"], topk_weights, ids, **more)

            runs[label] = captured(alone, joined)
    times = time_all(runs, rounds)
    record = {"shape": shape, "format": form, "M": num_tokens, "seconds": times, "ways": {}}
    found = {}
    for name in ways:
        gathered = [torch.empty_like(outputs[name]) for _ in range(size)]
        dist.all_gather(gathered, outputs[name])
        same = torch.tensor([repeats[name]], device=DEVICE, dtype=torch.int32)
        dist.all_reduce(same, dist.ReduceOp.MIN)
        if whole is not None:
            some = slice(0, CHECKED)
            tokens = [torch.cat([everything[0][r][i][some] for r in range(size)]) for i in range(3)]
            args = Arguments(tokens[0], whole["w1"], whole["w2"], *tokens[1:],
                             **{k: v for k, v in whole.items() if k not in w})  # fmt: skip
            record["ways"][name] = {
                "rule": rule(torch.cat([out[some] for out in gathered]), args, found),
                "bits": bool(same.item()), "out_bytes": plans[name].traffic.out_bytes,
                "back_bytes": plans[name].traffic.back_bytes, "op": plans[name].op.variant,
            }  # fmt: skip
    return record


def parts(name: str, ep: ExpertParallel, w: dict, named: dict, sets: list) -> dict:
    """The collectives of a way alone, and the experts alone, as runs."""
    x, topk_weights, ids = sets[0]
    formats = ep._checked(x, w["w1"], w["w2"], topk_weights, ids, named)
    call = Call(x, w["w1"], w["w2"], topk_weights, ids, formats=formats, ep=ep, arguments=named)
    group, size, most = ep.group, ep.group.size, ep.max_tokens
    even, rows, halved = [most] * size, size * most, call.halved(most)
    back = [0 if r == group.rank else most for r in range(size)] if halved and ep.way == "gather" else even
    if ep.way == "gather":
        payload = call.pack(None, most, 0)
        arrived, expert_map = group.all_gather(payload, ""), ep.expert_map
    else:
        payload = call.pack(ep_place(ids, ep.rank_of, ep.local_of, size, most), rows, most)
        arrived, expert_map = group.all_to_all(payload, even, even, ""), None
    partial = call.experts_on(arrived, expert_map)
    if halved:
        partial = ep_halve(partial, *((group.rank * most, most) if ep.way == "gather" else (0, 0)))

    def comm(payload, partial):
        out = group.all_gather(payload, "") if ep.way == "gather" else group.all_to_all(payload, even, even, "")
        if ep.way == "gather" and not halved:
            return out, group.reduce_scatter(partial, "")
        return out, group.all_to_all(partial, back, back, "")

    return {
        f"{name}: comm": captured(comm, [(payload, partial)]),
        f"{name}: experts": captured(lambda arrived: call.experts_on(arrived, expert_map), [(arrived,)]),
    }


@torch.no_grad()
def main(rank: int, options: argparse.Namespace, size: int, store: str) -> None:
    """One rank."""
    group = {"init_method": store, "rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=120)}
    if CUDA:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank), **group)
    else:
        dist.init_process_group("gloo", **group)
    gc.freeze()  # what is there already is not looked through again at every capture
    host = {"no graphs": host_costs(options.rounds)}
    table = network(options.rounds)
    host["beside graphs"] = host_costs(options.rounds)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if CUDA else None
    results = facts_of(gpus=size, nccl=nccl, host=host, collectives=table, cells=[])
    if rank == 0:
        print(*network_table(results), *host_table(results), sep="\n", flush=True)
    for shape in options.shapes:
        for form in options.formats:
            experts = ExpertParallel(None, SHAPES[shape][0]).local_experts
            mine = weights(list(experts), SHAPES[shape], form)
            whole = weights(list(range(SHAPES[shape][0])), SHAPES[shape], form) if rank == 0 else None
            for num_tokens in options.tokens:
                start = time.monotonic()
                record = cell(shape, form, num_tokens, mine, whole, options.rounds)
                if rank == 0:
                    print(*ranks_table({**results, "cells": [record]}), sep="\n")
                    print(f"({time.monotonic() - start:.1f} s)", flush=True)
                    results["cells"].append(record)
                    write(options.json, results)
            del mine, whole
            if CUDA:
                torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    options = parse_args()
    if options.report:
        recorded = json.loads(options.report.read_text())
        print(*network_table(recorded), *host_table(recorded), *ranks_table(recorded), sep="\n")
    elif "RANK" in os.environ:  # torchrun
        main(int(os.environ["LOCAL_RANK"]), options, int(os.environ["WORLD_SIZE"]), "env://")
    else:
        count = options.gpus or (torch.cuda.device_count() if CUDA else 2)
        if count < 2:
            raise SystemExit("it needs at least 2 GPUs")
        file = f"file:///tmp/moe_ops_expert_parallel_{os.getpid()}"
        torch.multiprocessing.spawn(main, (options, count, file), count)
