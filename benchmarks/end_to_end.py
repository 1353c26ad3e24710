"""Tokens per second of a Qwen3-30B-A3B-sized model by kind of experts: PYTHONPATH=. python benchmarks/end_to_end.py

A model of the real sizes but for the number of layers, with a vocabulary that is smaller by the same factor, and random
weights in bfloat16. Its experts run by transformers' `experts_implementation` eager, grouped_mm, batched_mm and
moe_ops; "+ routers" is moe_ops after `fuse_routers`. Steps of decoding with a static cache, and a prefill, as they are
and compiled whole in a CUDA graph, in turns, round after round; a sample is of --steps steps, or of fewer where those
take more than half a second. The MoE blocks (router and experts) are timed alone as well, compiled, on the hidden
states of the workload: what a step takes outside of them is the same for all, and no experts make it faster. Workloads
get ready, most of which is compiling, in processes side by side, and are timed one after the other when all are.

    PYTHONPATH=. python benchmarks/end_to_end.py --json FILE
    PYTHONPATH=. python benchmarks/end_to_end.py --json FILE --resume
                                  FILE is written workload by workload; goes on where an earlier run ended
    PYTHONPATH=. python benchmarks/end_to_end.py --report FILE [FILE ...]
                                  the tables again; what later files have takes the place of what earlier ones have
"""

import argparse
import copy
import datetime
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import triton
from in_turn import run_in_turn
from model_tables import IMPLEMENTATIONS, ROUTERS, RUNS, model_table
from torch import Tensor
from torch._inductor.async_compile import shutdown_compile_workers

import moe_ops.integrations.transformers as integration
from examples.serve_block import SIZES, SMALL, Decoder, capture, make_model

# Milliseconds that a sample takes at most, where a step does not.
LONGEST_SAMPLE = 500.0
# Of a result's row from grouped_mm's. The one in the middle counts: a router that hesitates between two experts may
# take the other one after a different rounding, or at equal logits.
TOLERANCE = 2e-2
NOT_COMPILED = "its loop over experts looks at the ids on the host, so there is no whole graph"
COPIES = "it would copy {:.0f} GB of weights, those of every route"


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the model's 48 (default %(default)s)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64], help="sequences that are decoded")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="steps of a sample (default %(default)s)")
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096], help="tokens of a prompt")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=[*RUNS], help="default: both")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument(
        "--together", type=int, default=4, metavar="N",
        help="workloads that get ready side by side; each has the model in the GPU's memory (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a tiny model in float32 on the CPU, to try the program")
    parser.add_argument("--json", help="a file for the results")
    parser.add_argument(
        "--resume", action="store_true", help="keep what FILE of --json has, if it is of the same settings"
    )
    parser.add_argument("--report", nargs="+", help="print the tables of such files, and run nothing")
    args = parser.parse_args()
    if args.resume and not args.json:
        parser.error("--resume goes on with the file of --json, which is missing")
    if args.together < 1:
        parser.error(f"--together is {args.together}, expected 1 or more")
    if not args.small and not args.report and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU: pass --small to try the program on the CPU")
    return args


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """What the model is in."""
    return torch.float32 if args.small else torch.bfloat16


def vocabulary_of(args: argparse.Namespace) -> int:
    """Words, fewer by the factor by which the model has fewer layers."""
    return 256 if args.small else 151936 * args.layers // 48


class Model:
    """The model, and the routers of its MoE blocks, as they are and fused."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Makes it."""
        self.device, self.dtype = "cpu" if args.small else "cuda", dtype_of(args)
        self.vocabulary = vocabulary_of(args)
        sizes = SMALL if args.small else SIZES
        self.whole = make_model(args.layers, self.vocabulary, self.device, self.dtype, sizes)
        self.blocks = [layer.mlp for layer in self.whole.model.layers]
        self.routers = [copy.deepcopy(block.gate) for block in self.blocks]
        integration.fuse_routers(self.whole)
        self.fused = [block.gate for block in self.blocks]

    def use(self, name: str) -> None:
        """Takes an implementation for what is called or compiled next."""
        for block, router in zip(self.blocks, self.fused if name == ROUTERS else self.routers, strict=True):
            block.gate = router
        self.whole.set_experts_implementation(integration.NAME if name == ROUTERS else name)

    def inputs_of_blocks(self, call: Callable[[], object]) -> list[Tensor]:
        """The hidden states that a call of the model gives to each block."""
        seen = []
        hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for block in self.blocks]
        self.use("grouped_mm")
        call()
        for hook in hooks:
            hook.remove()
        return seen

    def run_blocks(self, inputs: list[Tensor]) -> Tensor:
        """The results of the blocks in use, [layers, tokens, H]."""
        return torch.stack([block(x).flatten(0, -2) for block, x in zip(self.blocks, inputs, strict=True)])


class Workload:
    """What is timed: `step` so many times, after `start`; a step is of so many `tokens`."""

    def __init__(self, model: Model, tokens: int, step: Callable, start: Callable, steps: int) -> None:
        """Sets the attributes, and notes what its steps give to the blocks."""
        self.model, self.tokens, self.step, self.start, self.steps = model, tokens, step, start, steps
        start()
        self.inputs = model.inputs_of_blocks(step)

    def sample(self, call: Callable[[], object], steps: int) -> float:
        """Milliseconds of a step, by the host's clock."""
        self.start()
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            call()
        self._wait()
        return (time.perf_counter() - start) * 1e3 / steps

    def compiled(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function compiled whole, and captured where there is a GPU."""
        call = torch.compile(function, fullgraph=True, dynamic=False)
        self.start()
        return capture(call) if self.model.device == "cuda" else call

    def _wait(self) -> None:
        if self.model.device == "cuda":
            torch.cuda.synchronize()


def make_workload(model: Model, kind: str, size: int, args: argparse.Namespace) -> Workload:
    """Steps of decoding for so many sequences, or the prefill of a prompt of so many tokens."""
    if kind == "prefill":
        prompt = torch.randint(model.vocabulary, (1, size), device=model.device)
        return Workload(
            model, size, lambda: model.whole(prompt, use_cache=False, logits_to_keep=1).logits, lambda: None, 1
        )
    prompt = torch.randint(model.vocabulary, (size, args.context), device=model.device)
    model.use("grouped_mm")
    decoder = Decoder(model.whole, prompt, args.steps)
    # The likeliest tokens of a model that knows nothing are alike; these are not.
    decoder.first.random_(model.vocabulary)
    return Workload(model, size, decoder.step, decoder.rewind, args.steps)


def unusable(name: str, model: Model, tokens: int, compiled: bool) -> str | None:
    """Why an implementation is left out."""
    config = model.whole.config
    if name == "eager" and compiled:
        return NOT_COMPILED
    routes = tokens * config.num_experts_per_tok
    gigabytes = routes * 2 * config.moe_intermediate_size * config.hidden_size * model.dtype.itemsize / 1e9
    if name == "batched_mm" and model.device == "cuda":
        free = torch.cuda.get_device_properties(0).total_memory / 1e9 / 3
        return COPIES.format(1.5 * gigabytes) if gigabytes > free else None
    return None


def check(results: dict[str, Tensor]) -> None:
    """Holds blocks against grouped_mm's, or the first's.

    Raises:
        ArithmeticError: one is wrong.
    """
    expected = results.get("grouped_mm", next(iter(results.values()))).double()
    for name, result in results.items():
        rows = ((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
        if not rows.median().item() <= TOLERANCE:
            raise ArithmeticError(f"the MoE blocks of {name} differ by {rows.median():.1e} from those of grouped_mm")


Calls = dict[tuple[str, str], Callable[[], Tensor]]


def prepare(workload: Workload, names: list[str], *, compiled: bool) -> Calls:
    """What is to be timed, checked: ("step", name), and, compiled, its MoE blocks, ("blocks", name)."""
    model, calls, results = workload.model, {}, {}
    blocks = functools.partial(model.run_blocks, workload.inputs)
    for name in names:
        model.use(name)
        if compiled:
            calls["step", name] = workload.compiled(workload.step)
            calls["blocks", name] = workload.compiled(blocks)
            results[name] = calls["blocks", name]().clone()
        else:
            calls["step", name] = workload.step
            results[name] = blocks()
    check(results)
    return calls


def measure(workload: Workload, calls: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step: {"step": {name: ms}, "blocks": {...}}."""
    steps = dict.fromkeys(calls, workload.steps)
    samples = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            workload.model.use(key[1])
            took = workload.sample(call, steps[key])
            if number:
                samples[key].append(took)
            else:  # the first round warms up
                steps[key] = min(steps[key], max(1, int(LONGEST_SAMPLE / took)))
    medians = {"step": {}, "blocks": {}}
    for (part, name), times in samples.items():
        medians[part][name] = statistics.median(times)
    return medians


@dataclass(frozen=True)
class Job:
    """A workload, and what is to be measured of it.

    Attributes:
        args: of the command line.
        kind: "decode" or "prefill".
        tokens: of a step.
        runs: whether compiled.
    """

    args: argparse.Namespace
    kind: str
    tokens: int
    runs: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens}"


@torch.no_grad()
def measure_job(job: Job, turn: Callable[[], None]) -> list[dict]:
    """The cells of a workload; gets ready beside others, and is timed alone."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    integration.register()
    # A compiled function for each implementation and size.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    args, model = job.args, Model(job.args)
    workload = make_workload(model, job.kind, job.tokens, args)
    ready, cells = [], []
    for compiled in job.runs:
        reasons = {name: unusable(name, model, job.tokens, compiled) for name in args.implementations}
        names = [name for name, reason in reasons.items() if reason is None]
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        ready.append((compiled, prepare(workload, names, compiled=compiled), left_out))
    # Nothing of the compiling is to be at work beside what is timed: neither its processes nor passes over its objects.
    shutdown_compile_workers()
    gc.collect()
    gc.freeze()
    took = time.perf_counter() - start
    turn()
    start = time.perf_counter()
    for compiled, calls, left_out in ready:
        medians = measure(workload, calls, args.rounds)
        cells.append(
            {"workload": job.kind, "tokens": job.tokens, "compiled": compiled, **medians, "left_out": left_out}
        )
    gc.unfreeze()
    print(f"{job}: ready in {took:.0f} s, timed in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return cells


def run(args: argparse.Namespace) -> dict:
    """Measures everything; the record."""
    record = {
        "device": "CPU" if args.small else torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(), "dtype": str(dtype_of(args)).removeprefix("torch."),
        "layers": args.layers, "vocabulary": vocabulary_of(args), "context": args.context, "steps": args.steps,
        "rounds": args.rounds, "implementations": list(args.implementations),
    }  # fmt: skip
    record["cells"] = earlier(args.json, record) if args.resume else []
    done = {(cell["workload"], cell["tokens"], cell["compiled"]) for cell in record["cells"]}
    jobs = []
    for kind, sizes in (("decode", args.batch), ("prefill", args.prefill)):
        for size in sizes:
            runs = sorted(run == "compiled" for run in args.run)
            if missing := tuple(compiled for compiled in runs if (kind, size, compiled) not in done):
                jobs.append(Job(args, kind, size, missing))
    for _, cells in run_in_turn(measure_job, jobs, 1 if args.small else args.together):
        record["cells"] += cells
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    return record


def earlier(file: str, facts: dict) -> list[dict]:
    """What a file has of the same device, versions, day and settings."""
    if not Path(file).exists():
        return []
    record = json.loads(Path(file).read_text())
    return record["cells"] if {**record, "cells": None} == {**facts, "cells": None} else []


def main() -> None:
    """Runs the command."""
    args = parse_args()
    records = [json.loads(Path(file).read_text()) for file in args.report] if args.report else [run(args)]
    if set(args.implementations) == set(IMPLEMENTATIONS):
        print(*model_table(*records), sep="\n")


if __name__ == "__main__":
    main()
