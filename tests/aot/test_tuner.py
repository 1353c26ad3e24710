"""Ahead of time, without a GPU: the tuner compiles the very kernels that calls launch."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from triton import knobs
from triton.runtime.jit import JITFunction

import moe_ops.kernels
from moe_ops.aot.compiler import compile_for, find_for
from moe_ops.cli import ahead
from moe_ops.cli.calls import make_call, make_weights
from moe_ops.cli.tuner.calls import PARTS, Call, tiles_to_json
from moe_ops.cli.tuner.candidates import first_wave
from moe_ops.cli.tuner.compiler import Compiler, recorded
from moe_ops.cli.tuner.pool import Answer
from moe_ops.dispatch import make_plan
from moe_ops.kernels.compat import settle_key
from moe_ops.problem import make_problem
from moe_ops.testing import override
from tests.amount import params
from tests.aot.harness import DEVICES, compiling

DEVICE = DEVICES[90]
CALLS = {
    "one_token": Call((8, 2, 256, 128), 1, "bfloat16", "none", "tma"),
    "sorted": Call((8, 2, 256, 128), 33, "bfloat16", "none", "tma"),
    "pingpong": Call((8, 2, 256, 128), 1024, "bfloat16", "none", "tma"),
    "classic": Call((8, 2, 256, 128), 64, "float16", "none", "classic"),
    "blockscaled": Call((8, 2, 256, 128), 1024, "bfloat16", "fp8_block", "tma"),
    "fp8_channel": Call((8, 2, 256, 128), 64, "bfloat16", "fp8_channel", "tma"),
    "int4": Call((8, 2, 256, 128), 64, "bfloat16", "int4", "tma"),
    "mxfp4": Call((8, 2, 256, 128), 64, "bfloat16", "mxfp4", "tma"),
}


@pytest.mark.parametrize("name", params(CALLS, ("sorted",)))
def test_compiled_ahead_is_what_is_launched(name):
    """By Triton's own hash of source, argument types, what numbers are multiples of, constants and options."""
    call = CALLS[name]
    dtype = getattr(torch, call.dtype)
    args = make_call(
        call.sizes, make_weights(call.sizes, dtype, "cpu", call.form), call.tokens, "uniform", dtype, "cpu"
    )
    problem = make_problem(args)
    tiles = first_wave(call.problem(), DEVICE, call.path)[-1]
    with override(path=call.path, variant=tiles.variant, config=(tiles.up, tiles.down)):
        plan = make_plan(problem, DEVICE)
    backend = importlib.import_module(f"moe_ops.backends.{call.path}")
    out = args.hidden_states.new_empty(problem.out_shape, dtype=problem.out_dtype)
    with compiling(90) as launches:
        backend.run(args, problem, plan, out)
        parts = recorded(call, tiles, DEVICE)
        ahead = [compile_for(launch, 90) for part in parts.values() for launch in part]
    assert tuple(parts) == PARTS and parts["up"] and parts["down"]
    assert sorted(kernel.hash for kernel in ahead) == sorted(kernel.hash for _, kernel in launches)


def test_a_worker_that_compiles():
    call = CALLS["one_token"]
    own = first_wave(call.problem(), DEVICE, call.path)[0]
    request = {"op": "compile", "call": call.to_json(), "candidates": [tiles_to_json(own)], "part": "down"}
    events = []
    compiler = Compiler(DEVICE)
    assert compiler.answer(request, events.append) == 1 and events == [{"event": "begin", "index": 0}]
    assert not compiler.broken() and compiler.hello() == {}
    wrong = replace(own, up=replace(own.up, block_m=16))
    with pytest.raises(ValueError, match="both must be the same"):
        compiler.answer({**request, "candidates": [tiles_to_json(wrong)]}, events.append)


def test_what_the_cache_lacks_is_compiled_ahead(monkeypatch, tmp_path):
    """Each kernel once, and nothing where all is there; the workers' part is done here."""
    asked: list[dict] = []

    class Here:
        """A pool whose workers are this process."""

        def __init__(self, limit: float) -> None:
            self._waiting: list[tuple] = []

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

        def open(self, lane: str, target, arguments: tuple, workers: int) -> None:
            log, facts = arguments
            assert log is None and 0 < workers <= 2
            self._compiler = Compiler(replace(DEVICE, **facts))

        def submit(self, lane: str, request: dict, done, order: int) -> None:
            asked.append(request)
            self._waiting.append((request, done))

        def step(self) -> None:
            request, done = self._waiting.pop(0)
            done(Answer(self._compiler.answer(request, lambda event: None)))

    monkeypatch.setattr(ahead, "Pool", Here)
    monkeypatch.setattr(ahead, "_FEW", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = (((8, 2, 256, 128),) * 2, (1, 1), "bfloat16", "none", ("auto", "tma", "heuristic"), DEVICE)
    calls, steps = list(ahead.planned(*arguments)), []
    assert len(calls) == 12 and len(set(calls)) == 1
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        first = ahead.compile_ahead(calls, DEVICE, 2, lambda *step: steps.append(step))
        again = ahead.compile_ahead(calls, DEVICE, 2)
        launches = [launch for part in recorded(*calls[0], DEVICE).values() for launch in part]
        found = dict(find_for(launch, 90) for launch in launches)
        kept = {file.parent.name for file in tmp_path.glob("*/*.cubin")}
        assert len(found) == len(launches) > 1 and kept == found.keys() and all(found.values())
        assert not find_for(launches[0], 100)[1]
    assert first.kernels == first.missing == len(launches) == len(asked) == steps[-1][0] and first.errors == []
    assert (again.kernels, again.missing, again.workers) == (len(launches), 0, 0)
    assert f"kernels: {len(launches)} of {len(launches)} compiled in " in str(first)


def test_keys_do_not_depend_on_what_was_compiled_before(monkeypatch):
    """Processes that compile in another order than calls do fill Triton's cache with what calls look for."""
    modules = [
        importlib.import_module(f"moe_ops.kernels.{m.name}") for m in pkgutil.iter_modules(moe_ops.kernels.__path__)
    ]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
    kernels = {f"{f.__module__}.{f.__name__}": f for f in functions if f.__name__.endswith("_kernel")}

    def keys(names: list[str]) -> dict[str, str]:
        for function in functions:
            monkeypatch.setattr(function, "hash", None)
            monkeypatch.setattr(function, "used_global_vals", {})
        for name in names:
            settle_key(kernels[name])
        return {name: kernels[name].cache_key for name in names}

    assert len(kernels) > 10
    expected = keys(sorted(kernels))
    for first in kernels:
        assert keys([first])[first] == expected[first]
