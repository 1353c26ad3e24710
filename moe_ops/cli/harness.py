"""Timing on a power-limited card: every variant in every round, the ceilings too, and fractions of the same rounds."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 * 2**20
_STREAM_BYTES = 2 * 2**30
_MATMUL = 8192
_EAGER_CALLS = 50

# How often a sample is taken for which the host was not in time, each time with twice as much before it.
_ATTEMPTS = 4

Call = Callable[[], object]


class Sample(NamedTuple):
    """How long a call took.

    Attributes:
        milliseconds: its time.
        late: the device had nothing to do while the host still enqueued the call, which is in its time then.
    """

    milliseconds: float
    late: bool = False


@dataclass
class Timings:
    """Milliseconds of what was timed, one sample per round.

    Attributes:
        rounds: samples by name.
    """

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Median milliseconds, None where there are no samples."""
        samples = self.rounds.get(name)
        return statistics.median(samples) if samples else None


class Ceilings:
    """The ceilings, to be timed in the same rounds as everything else: products by cuBLAS and a read-only stream."""

    def __init__(self, *, fp8: bool = False) -> None:
        """Allocates the operands: bf16 8192^3, 2 GiB to read, and with `fp8` the same product of e4m3 operands."""
        a = torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16)
        product = torch.empty_like(a)
        self._memory = torch.randn(_STREAM_BYTES // 4, device="cuda")
        self._sink = torch.empty(1, device="cuda")
        self.variants = {"cublas": lambda: torch.mm(a, b, out=product), "stream": self.read(_STREAM_BYTES)}
        if fp8:
            self.variants["scaled_mm"] = _scaled_product(a, b)

    def read(self, nbytes: int) -> Call | None:
        """A read of so many bytes; None if there are not so many."""
        from moe_ops.kernels.stream import read_kernel

        if nbytes > _STREAM_BYTES:
            return None
        programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
        args = self._memory, self._sink, nbytes // 4
        return lambda: read_kernel[(programs,)](*args, BLOCK=8192, num_warps=8, enable_fp_fusion=True)

    @staticmethod
    def teraflops(milliseconds: float) -> float:
        """TFLOP/s of a cuBLAS product."""
        return 2 * _MATMUL**3 / milliseconds / 1e9

    @staticmethod
    def gigabytes(milliseconds: float) -> float:
        """GB/s of the stream."""
        return _STREAM_BYTES / milliseconds / 1e6


def _scaled_product(a: torch.Tensor, b: torch.Tensor) -> Call:
    """The product of two matrices rounded to e4m3, in bf16, with a scale per tensor: as fast as cuBLAS multiplies."""
    a, b = (matrix.to(torch.float8_e4m3fn) for matrix in (a, b))
    one = torch.ones((), device=a.device)
    # b by columns, the only order that fp8 products take.
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


class L2Flush:
    """Writes 256 MB, so that what is timed next finds nothing of its own in the L2."""

    def __init__(self) -> None:
        """Allocates what is written."""
        self._memory = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        """Enqueues the write."""
        self._memory.zero_()


@dataclass
class Captured:
    """A captured call: replays its CUDA graph and returns the captured result, which the replay wrote anew.

    Attributes:
        graph: the graph.
        result: what the call returned under capture.
        keep: the call. A graph keeps alive what was allocated under its capture, not the operands that the call holds.
    """

    graph: "torch.cuda.CUDAGraph"
    result: object
    keep: object

    def __call__(self) -> object:
        """Replays."""
        self.graph.replay()
        return self.result


def capture(call: Call, pool: tuple[int, int] | None = None) -> Captured:
    """Warms a call up and captures it in a CUDA graph.

    Args:
        call: what to capture.
        pool: of `torch.cuda.graph_pool_handle`, for graphs that need not keep what they wrote: those that share one
            share its memory. None: memory of its own.

    Returns:
        Its replay.

    Raises:
        RuntimeError: the call makes the host wait for the device.
    """
    with _side_stream():
        call()
        # What waits cannot be captured, and an attempt would leave the allocator inside a broken capture.
        with _no_waiting():
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return Captured(graph, result, keep=call)


def capture_stages(start: Callable[[], Iterator[str]]) -> dict[str, Captured]:
    """Captures each stage of a call in a CUDA graph of its own.

    Args:
        start: begins a call whose every `next` launches one stage and yields its name.

    Returns:
        Replays by name, in order. They share the workspaces of one call: a stage works on what the last replay of the
        one before it wrote.
    """
    with _side_stream():
        names = list(start())
    running = start()
    stages = {}
    # Not a step further than the last name: the end of the generator is the end of the workspaces.
    for name in names:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            next(running)
        stages[name] = Captured(graph, None, keep=running)
    return stages


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """Runs the block on another stream, where warming up belongs before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes an error of every operation of torch in the block that makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it may overlook some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def time_round_robin(calls: dict[str, Call], rounds: int, sample: Callable[[Call], Sample], between: Call) -> Timings:
    """Times calls in turn.

    A processor that has just waited for a long call may take longer for what it does next than the device for one
    `between`: such samples are taken again after more of them.

    Args:
        calls: what to time, by name; ready to be called again and again.
        rounds: samples of each.
        sample: (call) -> `Sample`; `device_milliseconds` or `host_milliseconds`.
        between: called before each sample; an `L2Flush`.

    Returns:
        The samples.
    """
    timings = Timings({name: [] for name in calls})
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            for attempt in range(_ATTEMPTS):
                for _ in range(2**attempt):
                    between()
                taken = sample(call)
                if not taken.late:
                    break
            if round_number:  # the first round settles clocks and caches
                timings.rounds[name].append(taken.milliseconds)
    return timings


def device_milliseconds(call: Call) -> Sample:
    """From event to event on the device, which what came before has to keep busy while the host enqueues the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    late = start.query()
    end.synchronize()
    return Sample(start.elapsed_time(end), late)


def host_milliseconds(call: Call) -> Sample:
    """What a call costs an eager caller: back-to-back calls by the host's clock, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_EAGER_CALLS):
        call()
    torch.cuda.synchronize()
    return Sample((time.perf_counter() - start) * 1e3 / _EAGER_CALLS)
