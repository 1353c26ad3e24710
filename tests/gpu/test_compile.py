"""torch.compile, torch.export and AOTInductor of a transformer block and of every format on the GPU."""

import os
from functools import partial

# A warm cache knows an op by its name alone and would hide a change of its schema.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from moe_ops import plans
from moe_ops.arguments import Arguments
from tests.blocks import (
    Calls,
    TransformerBlock,
    assert_block,
    assert_calls,
    dynamic_tokens,
    num_graphs,
    reset_compiler,
)

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
FP8 = pytest.mark.skipif(CAPABILITY < (8, 9), reason="fp8 needs compute capability 8.9")
TOKENS = (64, 1, 4096, 7, 512)
# Compilers in C++ and Triton's tuning of products take their time.
SLOW = pytest.mark.timeout(400)


def make_block() -> TransformerBlock:
    """A block whose experts take the TMA path where there is one, with every variant of the unquantised kernels."""
    return TransformerBlock("cuda", torch.bfloat16, scale=8)


@pytest.fixture(autouse=True)
def _reset():
    reset_compiler()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(CAPABILITY[0] != 9, reason="the variants are Hopper's")
def test_the_block_meets_every_variant():
    block = make_block()
    ids = torch.zeros(max(TOKENS), block.top_k, device="cuda", dtype=torch.int64)
    tensors = torch.zeros(max(TOKENS), block.hidden, device="cuda", dtype=torch.bfloat16), block.w1, block.w2
    variants = {
        plans.plan(Arguments(tensors[0][:n], *tensors[1:], ids[:n].float(), ids[:n]))[1].variant for n in TOKENS
    }
    assert variants == {"direct", "sorted", "pingpong"}


@SLOW
@pytest.mark.parametrize(
    ("mode", "context"),
    [
        ("default", torch.no_grad),
        ("default", torch.inference_mode),
        ("default", torch.enable_grad),
        ("reduce-overhead", torch.no_grad),
        ("reduce-overhead", torch.inference_mode),
        ("reduce-overhead", torch.enable_grad),
        ("max-autotune", torch.no_grad),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_modes(mode, context):
    block = make_block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, mode=mode)
    # CUDA graphs of torch.compile warm up, record and replay.
    for seed in range(3 if mode != "default" else 1):
        for num_tokens in TOKENS:
            with context():
                inputs = block.inputs(num_tokens, seed)
                torch.compiler.cudagraph_mark_step_begin()
                results = compiled(*inputs)
                assert results[0].requires_grad == (context is torch.enable_grad)
                assert_block(block, results, inputs)
    # One token, few tokens, and many: Inductor splits a reduction over the tokens from some number of them on.
    assert num_graphs() <= 3


def test_graphs_that_are_found_out():
    block = make_block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for num_tokens in (4096, 1, 2, 512, 4096, 1):
            inputs = block.inputs(num_tokens)
            assert_block(block, compiled(*inputs), inputs)
    assert num_graphs() == 3


def test_weights_updated_in_place():
    block = make_block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            inputs = block.inputs(64, seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert_block(block, compiled(*inputs), inputs)
            for weight in block.parameters():
                weight.mul_(0.9 + 0.05 * seed)
    assert num_graphs() == 1


@FP8
@SLOW
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_format(mode):
    calls = Calls("cuda")
    compiled = torch.compile(calls, fullgraph=True, dynamic=True, mode=mode)
    with torch.no_grad():
        for num_tokens in (7, 1, 300, 7, 7):
            inputs = calls.inputs(num_tokens)
            torch.compiler.cudagraph_mark_step_begin()
            assert_calls(calls, compiled(*inputs), inputs)
    assert num_graphs() == 2


@FP8
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export(strict):
    for module, check in ((make_block(), assert_block), (Calls("cuda"), assert_calls)):
        example = module.inputs(6)
        program = torch.export.export(module, example, dynamic_shapes=dynamic_tokens(example), strict=strict)
        for num_tokens in (1, 6, 300):
            inputs = module.inputs(num_tokens)
            with torch.no_grad():
                check(module, program.module()(*inputs), inputs)


@SLOW
@pytest.mark.parametrize("make", [make_block, pytest.param(lambda: Calls("cuda"), marks=FP8)], ids=["block", "formats"])
@torch.no_grad()
def test_aotinductor(make, tmp_path):
    module = make()
    example = module.inputs(6)
    program = torch.export.export(module, example, dynamic_shapes=dynamic_tokens(example))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    package = torch._inductor.aoti_load_package(path)
    check = assert_block if isinstance(module, TransformerBlock) else partial(assert_calls, packaged=True)
    for num_tokens in (64, 1, 300):
        inputs = module.inputs(num_tokens)
        check(module, package(*inputs), inputs)
