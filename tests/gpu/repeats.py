"""A kernel variant, repeated beside other work on the same GPU: python -m tests.gpu.repeats CASE

A process of its own, which test_repeats.py starts and watches: a barrier that is wrong hangs the kernel, and with it
whoever waits for the device. Every result has to be the first one bit for bit, and the first one right. Half of the
calls are replays of a CUDA graph, and every fourth finds its workspace full of NaN.
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.testing import assert_correct, override, poisoned_memory, quantized_inputs, random_inputs
from moe_ops.tuning import VARIANTS, TileConfig
from tests.cases import run

# 10,000 for a proof: MOE_OPS_REPEATS=10000 pytest -m gpu tests/gpu/test_repeats.py
REPEATS = int(os.environ.get("MOE_OPS_REPEATS", "1000"))
if REPEATS < 1:
    raise ValueError(f"MOE_OPS_REPEATS is {REPEATS}, expected at least 1: no repeats show nothing")

# All sizes whole tiles, and none.
SHAPES = (
    {"hidden": 1024, "intermediate": 512, "dtype": torch.bfloat16},
    {"hidden": 1000, "intermediate": 360, "dtype": torch.float16, "bias": True},
)
# Rows of 4 bits are whole steps of TMA too, and the last block of scales is short.
QUANTIZED_SHAPES = (SHAPES[0], {"hidden": 1056, "intermediate": 352, "dtype": torch.float16, "bias": True})


@dataclass(frozen=True)
class Case:
    """What `override` forces, the tokens of each of `shapes`, and the format as `quantized_inputs` takes it."""

    path: str
    variant: str
    tokens: tuple[int, int]
    config: tuple[TileConfig, TileConfig] | None = None
    quantized: dict[str, object] = field(default_factory=dict, hash=False)

    @property
    def shapes(self) -> tuple[dict[str, object], ...]:
        """Two kinds of sizes, with which every tile is whole, and hardly any."""
        return QUANTIZED_SHAPES if self.quantized else SHAPES

    def inputs(self, **sizes) -> Arguments:
        """A random call in the case's format."""
        return quantized_inputs(**self.quantized, **sizes) if self.quantized else random_inputs(**sizes)

    def override(self):
        """The context in which calls run as this case."""
        return override(path=self.path, variant=self.variant, config=self.config)


# The tiles are Hopper's, named here so that a change of the heuristics does not take a kernel out of these tests. Up to
# 2048 routes are sorted in one launch, more in three: both kinds are here.
CASES = {
    "sorted-swapped-tma": Case(
        "tma", "sorted", (64, 77), (TileConfig(16, 64, 128, 4, 4, 3, True), TileConfig(16, 128, 128, 4, 4, 3, True))
    ),
    "sorted-large-tma": Case(
        "tma", "sorted", (1024, 500), (TileConfig(128, 128, 64, 16, 8, 4), TileConfig(128, 256, 64, 16, 8, 4))
    ),
    "sorted-few-classic": Case(
        "classic", "sorted", (64, 77), (TileConfig(16, 64, 128, 8, 4, 3), TileConfig(16, 128, 128, 8, 4, 3))
    ),
    "sorted-large-classic": Case(
        "classic", "sorted", (1024, 500), (TileConfig(128, 64, 64, 16, 8, 3), TileConfig(128, 128, 64, 16, 8, 3))
    ),
    # Several tiles for each of the persistent programs, so that the consumers take turns.
    "pingpong": Case("tma", "pingpong", (2048, 1500)),
}
# All other variants are for a token or a few, and the same on both paths.
CASES |= {
    variant: Case("tma", variant, (1, 3))
    for variant in VARIANTS
    # Those of formats are below.
    if variant not in {"blockscaled", "packed", "mixed", *(c.variant for c in CASES.values())}
}
# The kernels that quantised weights have to themselves, with the tiles that they take.
QUANTIZED_CASES = {
    "blockscaled": Case(
        "tma", "blockscaled", (1024, 500), quantized={"quantization": "fp8_w8a8", "block_shape": (128, 128)}
    ),
    # Both consumers read one ring, as they do where an expert has more rows.
    "blockscaled-one-ring": Case(
        "tma",
        "blockscaled",
        (1024, 500),
        (TileConfig(128, 128, 128, 16, 4, 5), TileConfig(128, 256, 128, 16, 4, 5)),
        {"quantization": "fp8_w8a8", "block_shape": (128, 128)},
    ),
    "pingpong-fp8": Case(
        "tma", "pingpong", (2048, 1500), quantized={"quantization": "fp8_w8a8", "granularity": "channel"}
    ),
    "packed-int4": Case("tma", "packed", (64, 77), quantized={"quantization": "int4_w4a16", "block_shape": (0, 128)}),
    "packed-mxfp4": Case("tma", "packed", (1, 40), quantized={"quantization": "mxfp4_w4a16"}),
    "mixed-int8": Case(
        "tma", "mixed", (2048, 1500), quantized={"quantization": "int8_w8a16", "granularity": "channel"}
    ),
    "mixed-int4": Case("tma", "mixed", (2048, 1500), quantized={"quantization": "int4_w4a16", "block_shape": (0, 128)}),
    "mixed-mxfp4": Case("tma", "mixed", (2048, 300), quantized={"quantization": "mxfp4_w4a16"}),
    "sorted-int4": Case("tma", "sorted", (64, 77), quantized={"quantization": "int4_w4a16", "block_shape": (0, 128)}),
    "sorted-mxfp4": Case("tma", "sorted", (64, 77), quantized={"quantization": "mxfp4_w4a16"}),
    "direct-fp8": Case("tma", "direct", (1, 3), quantized={"quantization": "fp8_w8a8", "block_shape": (128, 128)}),
}
ALL_CASES = {**CASES, **QUANTIZED_CASES}


class Noise:
    """Work of changing kind and length on a second stream, so that no two calls find the device in the same state."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._memory = torch.empty(2**24, device="cuda")
        self._factors = [torch.randn(2048 * 2048, device="cuda").bfloat16() for _ in range(2)]
        self._product = torch.empty_like(self._factors[0])
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())

    def issue(self) -> None:
        """A few pieces of work on the second stream; now and then a pause on the current one."""
        with torch.cuda.stream(self._stream):
            for _ in range(self._random.randint(1, 6)):
                self._random.choice((self._fill, self._multiply, self._sleep))()
        if self._random.random() < 0.25:
            self._sleep()

    def _fill(self) -> None:
        self._memory[: self._random.randint(1, self._memory.numel())].fill_(self._random.random())

    def _multiply(self) -> None:
        m, n, k = (64 * self._random.randint(1, 32) for _ in range(3))
        left, right = self._factors
        torch.mm(left[: m * k].view(m, k), right[: k * n].view(k, n), out=self._product[: m * n].view(m, n))

    def _sleep(self) -> None:
        torch.cuda._sleep(self._random.randint(100, 50_000))  # cycles: up to 25 us


def _run_poisoned(args: Arguments) -> Tensor:
    with poisoned_memory():
        return run(args)


def _capture(call: Callable[[Arguments], Tensor], args: Arguments) -> Callable[[], Tensor]:
    """A replay of a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(args)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _bits(out: Tensor) -> Tensor:
    """As integers, among which a NaN equals itself and -0 is not 0."""
    return out.view(torch.int16)


def repeat(args: Arguments, noise: Callable[[], None]) -> str | None:
    """Makes a call `REPEATS` times without a look at the device in between; says which results differ, if any do."""
    first = run(args)
    assert_correct(first, args)
    _run_poisoned(args)
    replay, poisoned_replay = _capture(run, args), _capture(_run_poisoned, args)
    calls = 3 * [("call", lambda: run(args)), ("replay", replay)]
    calls += [("poisoned call", lambda: _run_poisoned(args)), ("poisoned replay", poisoned_replay)]
    expected = _bits(first)
    differs = torch.empty_like(expected, dtype=torch.bool)
    wrong = torch.zeros(REPEATS, dtype=torch.bool, device=expected.device)
    for index in range(REPEATS):
        noise()
        torch.ne(_bits(calls[index % len(calls)][1]()), expected, out=differs)
        torch.any(differs, out=wrong[index])
    found = wrong.nonzero().flatten().tolist()
    if not found:
        return None
    kinds = sorted({calls[index % len(calls)][0] for index in found})
    return (
        f"{len(found)} of {REPEATS} results differ from the first: {', '.join(kinds)}; the first is number {found[0]}"
    )


def main(name: str) -> None:
    """Runs a case in all its shapes; the last line printed says how far it came."""
    case = ALL_CASES[name]
    noise = Noise()
    for num_tokens, shape in zip(case.tokens, case.shapes, strict=True):
        print(f"{num_tokens} tokens, {shape}", flush=True)
        args = case.inputs(num_tokens=num_tokens, experts=16, top_k=4, device="cuda", **shape)
        with case.override():
            problem = repeat(args, noise.issue)
        if problem is not None:
            sys.exit(problem)


if __name__ == "__main__":
    main(sys.argv[1])
