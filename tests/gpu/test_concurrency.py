"""The op among others: threads, streams, graphs, devices, processes, and memory that is short or must come back."""

import concurrent.futures
import gc
import multiprocessing
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

import moe_ops
from moe_ops import plans
from moe_ops.arguments import Arguments
from moe_ops.testing import assert_correct, override, random_inputs
from tests.cases import run
from tests.gpu.repeats import SHAPES
from tests.quantized import quantized_case

MODEL = {"experts": 16, "top_k": 4, "device": "cuda", **SHAPES[0]}
GIGABYTE = 2**30


def first_tokens(args: Arguments, count: int) -> Arguments:
    """The call for the first tokens."""
    names = ("hidden_states", "topk_weights", "topk_ids")
    return replace(args, **{name: getattr(args, name)[:count] for name in names})


def explain(args: Arguments) -> moe_ops.Plan:
    return plans.plan(args)[1]


@pytest.mark.parametrize("progress", [-(2**30), 2**30], ids=["nobody comes", "all are far ahead"])
@pytest.mark.parametrize("form", [None, "fp8_block"])
def test_programs_that_wait_in_vain(form, progress, monkeypatch):
    """The counters by which programs keep in step are for speed: with wrong ones a result is as it was, and in time."""
    from moe_ops.backends import pipeline

    dtype = torch.bfloat16
    sizes = {"num_tokens": 3000, "hidden": 1024, "intermediate": 1152, "experts": 8, "top_k": 2}
    make = partial(quantized_case, form) if form else random_inputs
    args = make(dtype=dtype, device="cuda", **sizes)
    variant = "blockscaled" if form else "pingpong"
    sort = pipeline.sort_routes

    def sort_and_spoil(*sort_args):
        routing = sort(*sort_args)
        sort_args[-1].fill_(progress)
        return routing

    with override(path="tma", variant=variant):
        expected = run(args)
        monkeypatch.setattr(pipeline, "sort_routes", sort_and_spoil)
        out = run(args)
    assert_correct(expected, args)
    assert torch.equal(out, expected)


THREADS, CALLS = 4, 200
# Every variant and both sorts.
TOKENS = (1, 3, 17, 64, 300, 1500, 4096)


def test_threads():
    """Each its own stream, all at once from a state in which no plan is known; other threads see no override."""
    args = random_inputs(num_tokens=TOKENS[-1], **MODEL)
    calls = [first_tokens(args, count) for count in TOKENS]
    assert {explain(call).variant for call in calls} >= {"direct", "sorted"}
    expected = [run(call) for call in calls]
    for call, out in zip(calls, expected, strict=True):
        assert_correct(out, call)
    plans._plans.clear()
    torch.cuda.synchronize()

    def work(seed: int) -> bool:
        draw = random.Random(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong = torch.zeros((), dtype=torch.bool, device="cuda")
            for _ in range(CALLS):
                index = draw.randrange(len(calls))
                wrong |= (run(calls[index]) != expected[index]).any()
            return wrong.item()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == THREADS * [False]


@pytest.mark.parametrize("routing", ["zipf", "hostile"])
def test_graph_after_bigger_calls_and_churn(case, routing):
    """A graph is captured small; then its inputs change in place, bigger calls run and a gigabyte comes and goes."""
    small = random_inputs(num_tokens=case.tokens[0], **MODEL)
    other = random_inputs(num_tokens=case.tokens[0], seed=1, routing=routing, **MODEL)
    bigger = random_inputs(num_tokens=5000, **MODEL)
    with case.override():
        run(small)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(small)
        graph.replay()
        assert_correct(out, small)
        for name, tensor in small.tensors().items():
            tensor.copy_(getattr(other, name))
        for _ in range(3):
            run(bigger)
            torch.full((GIGABYTE // 4,), float("nan"), device="cuda")
            torch.cuda.empty_cache()
            graph.replay()
        assert torch.equal(out, run(other))


@pytest.mark.own_process(TRITON_ALWAYS_COMPILE="1")
@pytest.mark.parametrize("path", ["classic", "tma"])
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_first_call_inside_a_capture(num_tokens, path):
    """Nothing is compiled, no module loaded: it works, or says that it is the capture, and a call outside then works.

    To compile touches no device, but Triton then loads the module, and whether a driver lets it while a stream is
    captured in mode "global" is the driver's to say.
    """
    args = random_inputs(num_tokens=num_tokens, **MODEL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = run(args, path=path)
    except RuntimeError as error:
        # The end of a capture that was broken raises over what broke it.
        messages = [str(e) for e in (error, error.__context__) if e is not None]
        print("refused:", *messages, sep="\n")
        assert any("captur" in message for message in messages)
        # The context that failed to end may have left its stream as the current one.
        with torch.cuda.stream(torch.cuda.default_stream()):
            out = run(args, path=path)
            torch.cuda.synchronize()
    else:
        print("captured")
        graph.replay()
    assert_correct(out, args)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@TWO_GPUS
def test_not_the_current_device(case):
    args = random_inputs(num_tokens=case.tokens[0], **{**MODEL, "device": "cuda:1"})
    with torch.cuda.device(0), case.override():
        out = run(args)
        again = run(args)
        assert torch.cuda.current_device() == 0
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out, again)
    assert_correct(out, args)


@TWO_GPUS
def test_one_plan_per_device():
    """The same call on one device after the other: what was compiled for the first is not launched on the second."""
    results = [run(random_inputs(num_tokens=64, **{**MODEL, "device": f"cuda:{index}"})) for index in (0, 1, 0)]
    assert torch.equal(results[0], results[2])
    assert results[1].isfinite().all() and results[1].device.index == 1


@TWO_GPUS
def test_two_devices_in_one_call():
    args = random_inputs(num_tokens=64, **MODEL)
    args.w2 = args.w2.to("cuda:1")
    with pytest.raises(ValueError, match="w2 is on cuda:1"):
        run(args)


def _call_on(device: str) -> None:
    """In a child process: one call, checked."""
    torch.set_num_threads(1)
    args = random_inputs(num_tokens=21, hidden=72, intermediate=40, experts=5, top_k=3, device=device)
    assert_correct(run(args), args)


@pytest.mark.own_process
@pytest.mark.parametrize(("method", "device"), [("fork", "cpu"), ("spawn", "cuda")])
def test_child_processes(method, device):
    """From a process that has used the op and CUDA: a fork may not use CUDA, but the CPU path; a new process may."""
    args = random_inputs(num_tokens=64, **MODEL)
    assert_correct(run(args), args)
    child = multiprocessing.get_context(method).Process(target=_call_on, args=(device,))
    child.start()
    child.join(60)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0


@pytest.fixture
def quiet_memory():
    """Nothing cached, no garbage: what is allocated from here on is the test's own. Undoes a limit too."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def _runs_out_of_memory(args: Arguments) -> bool:
    try:
        run(args)
    except torch.OutOfMemoryError:
        return True
    return False


# Parts of what a call takes: it then runs out at the result, at act, at the rows.
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_out_of_memory_and_then_a_good_call(share, case, quiet_memory):
    # Made on the CPU: what is freed while arguments are made would be room that no limit counts.
    args = random_inputs(num_tokens=100_000, **{**MODEL, "device": "cpu"})
    args = replace(args, **{name: tensor.cuda() for name, tensor in args.tensors().items()})
    few = first_tokens(args, 64)
    with case.override():
        expected = run(few)
        run(first_tokens(args, 5000))
        taken = explain(args).workspace_bytes + args.hidden_states.nbytes
        torch.cuda.empty_cache()
        before, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + share * taken) / total)
        assert _runs_out_of_memory(args)
        gc.collect()
        assert torch.cuda.memory_allocated() == before
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(run(few), expected)
        assert run(args).isfinite().all()


def requested_bytes(when: str) -> int:
    """What tensors asked for; the allocator's blocks, up to 1 MiB larger each, are not a plan's to say."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def test_memory_of_a_thousand_calls(quiet_memory):
    """The allocator is back where it was, and at no time was there more than a plan says."""
    args = random_inputs(num_tokens=4096, **MODEL)
    draw = random.Random(0)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(1000):
        count = draw.randint(0, 8) if number % 4 == 0 else draw.randint(0, 4096)
        call = first_tokens(args, count)
        expected = explain(call).workspace_bytes + call.hidden_states.nbytes
        torch.cuda.reset_peak_memory_stats()
        before = requested_bytes("current")
        run(call)
        peak = requested_bytes("peak") - before
        assert abs(peak - expected) <= 0.05 * expected + 64, f"{count} tokens: {peak} bytes, plan: {expected}"
        assert torch.cuda.memory_allocated() == allocated
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == reserved
