"""The router's kernel, compiled for every architecture: no spills, and a warp reduces keys in one instruction."""

import pytest

from moe_ops.backends.topk import topk_route
from moe_ops.router import make_router
from tests.aot.harness import DEVICES, compiling, report
from tests.routers import draw


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_compiles(name, arch):
    logits, top_k, bias, options = draw(name, 2)
    with compiling(arch) as launches:
        topk_route(logits, bias, make_router(logits, top_k, bias, **options))
    ((function, kernel),) = launches
    compiled = report(function.__name__, kernel)
    assert compiled.spills == 0 and compiled.shared_memory == 0, compiled
    # Two in each turn: the largest key, then the lowest expert that has it.
    assert compiled.count("redux.sync") >= (2 if " bra " in compiled.ptx else 2 * top_k)
