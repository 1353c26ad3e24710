"""The Triton paths on a GPU: numerics by the rule of correctness, determinism, hostile input, large offsets."""

import pytest
import torch

import moe_ops
from moe_ops.cli.bench import SHAPES
from moe_ops.testing import assert_correct, assert_exact, exact_inputs, override, poisoned_memory, random_inputs
from tests.cases import OPTIONS, option_case, run
from tests.padding import PADDED, assert_padding_left, padded_case

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
HAS_TMA = torch.version.cuda is not None and CAPABILITY >= (9, 0)
TMA = pytest.param("tma", marks=pytest.mark.skipif(not HAS_TMA, reason="needs compute capability 9.0"))
PATHS = pytest.mark.parametrize("path", ["classic", TMA])
HALF = [torch.bfloat16, torch.float16]

# Rows per expert from one to hundreds: every tile the heuristic chooses between.
TOKENS = [1, 2, 7, 33, 128, 600]


def _poison_free_memory():
    """Leaves NaN in the memory the allocator hands out next."""
    free, _ = torch.cuda.mem_get_info()
    blocks = [torch.full((2**28,), float("nan"), device="cuda") for _ in range(min(4, free // 2**31))]
    del blocks


@pytest.mark.parametrize("name", OPTIONS)
@PATHS
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_option(name, path, dtype):
    args = option_case(name, dtype, "cuda", num_tokens=129, hidden=264, intermediate=136)
    with poisoned_memory():
        out = run(args, path=path)
    assert_correct(out, args)
    assert torch.equal(run(args, path=path), out)


@pytest.mark.parametrize("name", OPTIONS)
@PATHS
def test_option_without_a_sort(name, path):
    args = option_case(name, torch.bfloat16, "cuda", num_tokens=3, hidden=264, intermediate=136)
    with override(path=path, variant="direct"), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


HOPPER = pytest.mark.skipif(CAPABILITY[0] != 9, reason="wgmma is Hopper's")


@HOPPER
@pytest.mark.parametrize(("name", "variant"), PADDED)
def test_padding_is_left(name, variant):
    assert_padding_left(padded_case(name, "cuda"), path="tma", variant=variant)


@HOPPER
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_pingpong_option(name, dtype):
    args = option_case(name, dtype, "cuda", num_tokens=700, hidden=264, intermediate=136)
    with override(path="tma", variant="pingpong"), poisoned_memory():
        out = run(args)
    assert_correct(out, args)
    with override(path="tma", variant="pingpong"):
        for _ in range(5):
            assert torch.equal(run(args), out)


@HOPPER
@pytest.mark.parametrize(
    "sizes", [(64, 64), (256, 256), (2880, 2880), (8, 16), (1000, 360), (384, 1440), (1400, 40)], ids=str
)
@pytest.mark.parametrize("num_tokens", [1, 65, 3000])
def test_pingpong_sizes(sizes, num_tokens):
    """One step of K and many, tails, fewer tiles than programs, and none."""
    hidden, intermediate = sizes
    args = random_inputs(
        num_tokens=num_tokens, hidden=hidden, intermediate=intermediate, experts=5, top_k=2, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    with override(path="tma", variant="pingpong"), poisoned_memory():
        assert_correct(run(args), args)
        args.topk_ids = torch.full_like(args.topk_ids, -1)
        assert (run(args) == 0).all()


@HOPPER
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_pingpong_exact_integers(dtype):
    args = exact_inputs(num_tokens=900, hidden=1000, intermediate=360, experts=7, top_k=3, dtype=dtype, device="cuda")
    with override(path="tma", variant="pingpong"):
        assert_exact(run(args), args)


@pytest.mark.parametrize("name", OPTIONS)
def test_option_float32(name):
    args = option_case(name, torch.float32, "cuda", num_tokens=65, hidden=136, intermediate=72)
    with poisoned_memory():
        out = run(args)
    assert_correct(out, args)
    assert torch.equal(run(args), out)


@pytest.mark.parametrize(
    "dtype,num_tokens", [*((dtype, tokens) for dtype in HALF for tokens in TOKENS), (torch.float32, 7)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_model_shape(shape, dtype, num_tokens):
    experts, top_k, hidden, intermediate = SHAPES[shape]
    args = random_inputs(
        num_tokens=num_tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=dtype,
        device="cuda", seed=num_tokens,
    )  # fmt: skip
    reference = moe_ops.reference.fused_moe_reference(args)
    for path in ("classic", "tma") if HAS_TMA and dtype != torch.float32 else ("classic",):
        _poison_free_memory()
        out = run(args, path=path)
        assert_correct(out, args, reference=reference)
        for _ in range(5):
            assert torch.equal(run(args, path=path), out)


@PATHS
@pytest.mark.parametrize("num_tokens", [5, 400])
@pytest.mark.parametrize("experts", [1, 3, 60, 384])
def test_number_of_experts(experts, num_tokens, path):
    args = random_inputs(
        num_tokens=num_tokens, hidden=256, intermediate=192, experts=experts, top_k=min(4, experts),
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    assert_correct(run(args, path=path), args)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 300])
def test_511_falls_back(num_tokens, dtype):
    args = random_inputs(
        num_tokens=num_tokens, hidden=511, intermediate=192, experts=8, top_k=2, dtype=dtype, device="cuda"
    )
    plan = moe_ops.explain(*args.tensors().values())
    assert plan.path == "classic"
    assert_correct(run(args), args)


@PATHS
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 40, 500])
def test_exact_integers(num_tokens, dtype, path):
    args = exact_inputs(
        num_tokens=num_tokens, hidden=1000, intermediate=360, experts=7, top_k=3, dtype=dtype, device="cuda"
    )
    assert_exact(run(args, path=path), args)


@PATHS
def test_nan_stays_with_the_tokens_it_reaches(path):
    args = option_case("plain", torch.bfloat16, "cuda", num_tokens=200)
    clean = run(args, path=path)
    args.hidden_states = args.hidden_states.clone()
    args.hidden_states[4] = float("nan")
    out = run(args, path=path)
    rest = torch.arange(200, device="cuda") != 4
    assert torch.equal(out[rest], clean[rest])
    assert out[4].isnan().all()


@PATHS
def test_expert_map(path):
    args = option_case("plain", torch.bfloat16, "cuda", num_tokens=300)
    args.topk_ids = torch.randint(-1, 9, (300, 3), device="cuda")
    args.expert_map = torch.tensor([2, -1, 0, 77, 1, 4, 3], dtype=torch.int32, device="cuda")
    assert_correct(run(args, path=path), args)


@PATHS
def test_side_stream(path):
    args = option_case("plain", torch.bfloat16, "cuda", num_tokens=300)
    expected = run(args, path=path)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = run(args, path=path)
    stream.synchronize()
    assert torch.equal(out, expected)


@PATHS
def test_batch_invariance(path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    args = random_inputs(
        num_tokens=1000, hidden=512, intermediate=256, experts=16, top_k=4, dtype=torch.bfloat16, device="cuda"
    )
    full = run(args, path=path)
    for count in (1, 17, 300):
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            setattr(args, name, getattr(args, name)[:count])
        assert torch.equal(run(args, path=path), full[:count])
        args = random_inputs(
            num_tokens=1000, hidden=512, intermediate=256, experts=16, top_k=4, dtype=torch.bfloat16, device="cuda"
        )


@PATHS
def test_expert_offsets_beyond_int32(path):
    """E * 2I * H > 2^31: the last expert gives what it gives alone."""
    args = random_inputs(
        num_tokens=16, hidden=4096, intermediate=2048, experts=130, top_k=1, dtype=torch.bfloat16, device="cuda",
        routing="one_expert",
    )  # fmt: skip
    assert args.w1.numel() > 2**31
    out = run(args, path=path)
    args.w1, args.w2 = args.w1[-1:].clone(), args.w2[-1:].clone()
    args.topk_ids = torch.zeros_like(args.topk_ids)
    assert torch.equal(out, run(args, path=path))


@PATHS
def test_token_offsets_beyond_int32(path):
    """R * H > 2^31: the last tokens give what they give alone."""
    args = random_inputs(
        num_tokens=270_000, hidden=1024, intermediate=128, experts=4, top_k=8, dtype=torch.bfloat16, device="cuda",
        routing="duplicates",
    )  # fmt: skip
    assert args.topk_ids.numel() * 1024 > 2**31
    out = run(args, path=path)
    assert not out.isnan().any()
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        setattr(args, name, getattr(args, name)[-64:])
    assert_correct(out[-64:], args)


@pytest.mark.parametrize(
    "num_tokens,experts,block",
    [(1, 1, 16), (16, 60, 16), (128, 1025, 64), (256, 32, 64), (2048, 256, 64), (140_000, 128, 128)],
)
def test_route(num_tokens, experts, block):
    ids = torch.randint(-1, experts + 1, (num_tokens, 8), device="cuda")
    with poisoned_memory():
        got = moe_ops.route(ids, experts, block)
    for mine, expected in zip(got, moe_ops.route(ids.cpu(), experts, block), strict=True):
        assert torch.equal(mine.cpu(), expected)


def test_reference_and_cpu_agree_with_the_device():
    args = option_case("biases", torch.float32, "cuda")
    expected = run(args, path="reference")
    assert expected.device.type == "cuda"
    for name, tensor in args.tensors().items():
        setattr(args, name, tensor.cpu())
    torch.testing.assert_close(run(args), expected.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@PATHS
def test_other_device_than_the_current_one(path):
    args = option_case("plain", torch.bfloat16, "cuda:1", num_tokens=100)
    with torch.cuda.device(0):
        assert_correct(run(args, path=path), args)


@PATHS
def test_override_tiles(path):
    from moe_ops.tuning import TileConfig

    args = random_inputs(
        num_tokens=300, hidden=328, intermediate=200, experts=5, top_k=2, dtype=torch.bfloat16, device="cuda"
    )
    for config in (TileConfig(16, 32, 64), TileConfig(32, 64, 128, 4, 4, 2), TileConfig(128, 64, 32, 1, 8, 5)):
        with override(path=path, config=config), poisoned_memory():
            assert_correct(run(args), args)
