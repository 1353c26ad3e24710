"""Timing on a power-limited card: every variant in every round, the ceilings too, and fractions of the same rounds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_FLUSH_BYTES = 256 * 2**20
_STREAM_BYTES = 2 * 2**30
_MATMUL = 8192
_EAGER_CALLS = 50


@dataclass
class Timings:
    """Milliseconds of each variant, one per round.

    Attributes:
        rounds: samples by variant.
        errors: why a variant could not be timed.
    """

    rounds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Median milliseconds of a variant, None where there are none."""
        samples = self.rounds.get(name)
        return statistics.median(samples) if samples else None


class Ceilings:
    """The two ceilings, to be timed in the same rounds as everything else: a cuBLAS product and a read-only stream."""

    def __init__(self) -> None:
        """Allocates the operands: bf16 8192^3, and 2 GiB to read."""
        from moe_ops.kernels.stream import read_kernel

        a = torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16)
        product = torch.empty_like(a)
        memory = torch.randn(_STREAM_BYTES // 4, device="cuda")
        sink = torch.empty(1, device="cuda")
        programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count

        def read() -> None:
            read_kernel[(programs,)](memory, sink, memory.numel(), BLOCK=8192, num_warps=8, enable_fp_fusion=True)

        self.variants = {"cublas": lambda: torch.mm(a, b, out=product), "stream": read}

    @staticmethod
    def teraflops(milliseconds: float) -> float:
        """TFLOP/s of the cuBLAS product."""
        return 2 * _MATMUL**3 / milliseconds / 1e9

    @staticmethod
    def gigabytes(milliseconds: float) -> float:
        """GB/s of the stream."""
        return _STREAM_BYTES / milliseconds / 1e6


def capture(call: Callable[[], object]) -> Callable[[], None]:
    """Warms a call up and captures it in a CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_round_robin(variants: dict[str, Callable[[], object]], rounds: int, *, graph: bool = True) -> Timings:
    """Times variants in turn, with the L2 flushed before each by writing 256 MB.

    Args:
        variants: what to time, by name.
        rounds: samples of each.
        graph: replay CUDA graphs and time on the device; otherwise call eagerly and time by the host's clock.

    Returns:
        The samples. A variant that raises is recorded with its error and left out.
    """
    timings = Timings()
    calls = {}
    for name, call in variants.items():
        try:
            calls[name] = capture(call) if graph else call
            calls[name]()
            torch.cuda.synchronize()
        except Exception as error:
            timings.errors[name] = f"{type(error).__name__}: {error}"
            calls.pop(name, None)
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    sample = _device_milliseconds if graph else _host_milliseconds
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            flush.fill_(round_number)
            milliseconds = sample(call)
            if round_number:  # the first round settles clocks and caches
                timings.rounds.setdefault(name, []).append(milliseconds)
    return timings


def _device_milliseconds(call: Callable[[], object]) -> float:
    """From event to event on the device; the flush before keeps it busy while the host enqueues the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_milliseconds(call: Callable[[], object]) -> float:
    """What a call costs an eager caller: back-to-back calls by the host's clock, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_EAGER_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / _EAGER_CALLS
