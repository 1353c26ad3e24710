"""The warp-specialised kernels for Hopper, emulated on the CPU: numerics by the rule, orders, faults that are found."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ops.backends.pingpong import descriptor
from moe_ops.cli.measure import own_call
from moe_ops.kernels.compat import tma_load, tma_store
from moe_ops.problem import make_problem
from moe_ops.testing import assert_correct, assert_exact, emulate, override, poisoned_memory, random_inputs
from moe_ops.testing.hopper import describe_hopper, hopper
from moe_ops.testing.hopper.machine import HopperError
from moe_ops.testing.sanitizer import sanitized
from moe_ops.testing.strategies import assert_result, build, calls, formats
from moe_ops.tuning import TileConfig, variant_obstacle
from tests.amount import ALL, params
from tests.cases import OPTIONS, option_case, run
from tests.fuzz import drawing
from tests.interp.test_fuzz import EXAMPLES
from tests.padding import PADDED, assert_padding_left, padded_case
from tests.quantized import (
    FORMATS,
    check_every_scale,
    every_scale_case,
    fine_scales_case,
    negative_scales_case,
    one_hot_case,
    quantized_case,
    scales_of_zero_case,
)

HALF = (torch.bfloat16, torch.float16)
KERNELS = ("pingpong", "blockscaled", "packed", "mixed")


def runs(variant: str, args) -> bool:
    return variant_obstacle(variant, make_problem(args), describe_hopper(), "tma") is None


def emulated(args, variant: str, num_sms: int = 2, seed: int = 0, **forced) -> torch.Tensor:
    """The result of a call through a variant, which has run."""
    with hopper(num_sms, seed) as launches, override(path="tma", variant=variant, **forced), poisoned_memory():
        out = run(args)
    assert len(args.topk_ids) == 0 or any(name.startswith(variant) for name in launches.programs)
    return out


@pytest.mark.parametrize(
    ("name", "dtype"),
    params(
        [(name, dtype) for name in OPTIONS for dtype in HALF], [(name, torch.bfloat16) for name in list(OPTIONS)[::2]]
    ),
    ids=str,
)
def test_option(name, dtype):
    args = option_case(name, dtype)
    assert_correct(emulated(args, "pingpong"), args)


FORMAT_RUNS = [
    (name, variant, tokens)
    for name in FORMATS
    for variant in KERNELS
    for tokens in (9, 40)
    if runs(variant, quantized_case(name, torch.bfloat16))
]


@pytest.mark.parametrize(
    ("name", "variant", "tokens"),
    params(FORMAT_RUNS, [run for run in FORMAT_RUNS if (run[1] == "packed") == (run[2] == 9)]),
)
def test_format(name, variant, tokens):
    """Few rows, and more than a block of them; the last block of K and the one between gate and up are short."""
    dtype = torch.float16 if tokens == 9 else torch.bfloat16
    args = quantized_case(name, dtype, num_tokens=tokens, hidden=288, bias=True, routing="zipf")
    assert_correct(emulated(args, variant), args)


@pytest.mark.parametrize(("name", "variant"), PADDED)
def test_padding_is_left(name, variant):
    """No bytes are written for rows that nobody reads."""
    with hopper():
        assert_padding_left(padded_case(name), path="tma", variant=variant)


OPTIONS_OF_FORMATS = ("biases_interleaved", "router_weight_on_input", "swigluoai", "silu_no_gate")


@pytest.mark.parametrize(
    ("name", "variant", "option"),
    params(
        [
            (name, variant, option)
            for name, variant in (
                ("fp8_block", "blockscaled"),
                ("int4_zero_points", "packed"),
                ("int8_weights", "mixed"),
                ("int4_zero_points", "mixed"),
            )
            for option in OPTIONS_OF_FORMATS
        ],
        [
            ("fp8_block", "blockscaled", "silu_no_gate"),
            ("int4_zero_points", "packed", "router_weight_on_input"),
            ("int8_weights", "mixed", "biases_interleaved"),
            ("int4_zero_points", "mixed", "biases_interleaved"),
            ("int8_weights", "mixed", "silu_no_gate"),
        ],
    ),
)
def test_option_of_a_format(name, variant, option):
    args = quantized_case(name, torch.bfloat16, **OPTIONS[option])
    assert_correct(emulated(args, variant), args)


@pytest.mark.parametrize(("block_m", "splits"), params(itertools.product((8, 16, 32), (1, 2)), [(8, 2), (32, 1)]))
def test_tiles_of_packed(block_m, splits):
    args = quantized_case("int4", torch.bfloat16, num_tokens=5, bias=True, intermediate=544)
    down = TileConfig(block_m, 64, 256, 1, 4, 3, True)
    config = (TileConfig(block_m, 32, 256, 1, 4, 3, True), down)
    assert_correct(emulated(args, "packed", config=config, splits=splits), args)


@pytest.mark.parametrize("variant", ["packed", "mixed"])
@pytest.mark.parametrize("quantization", ["int4_w4a16", "mxfp4_w4a16"])
def test_every_code_in_every_place(quantization, variant):
    args = one_hot_case(quantization, torch.bfloat16, num_tokens=16)
    assert_exact(emulated(args, variant), args)


@pytest.mark.parametrize("variant", ["packed", "mixed"])
def test_every_scale_of_mxfp4(variant):
    with hopper():
        check_every_scale(*every_scale_case("cpu", 8), variant)


@pytest.mark.parametrize(("sizes", "num_sms"), [((64, 64), 3), ((8, 16), 1), ((520, 360), 3)], ids=str)
def test_sizes(sizes, num_sms):
    """One K step and more than a ring has, fewer tiles than programs and more than one each; no route at all."""
    hidden, intermediate = sizes
    args = random_inputs(
        num_tokens=70, hidden=hidden, intermediate=intermediate, experts=3, top_k=2, dtype=torch.bfloat16
    )
    assert_correct(emulated(args, "pingpong", num_sms), args)
    args.topk_ids = torch.full_like(args.topk_ids, -1)
    assert (emulated(args, "pingpong", num_sms) == 0).all()


@pytest.mark.parametrize(
    ("variant", "name"),
    [("pingpong", "plain"), ("blockscaled", "fp8_block"), ("packed", "int4"), ("mixed", "int8_weights")],
)
def test_the_order_of_things_changes_nothing(variant, name):
    args = option_case(name, torch.bfloat16) if name in OPTIONS else quantized_case(name, torch.bfloat16, num_tokens=4)
    out = emulated(args, variant)
    for seed in range(1, 10 if ALL else 3):
        assert torch.equal(emulated(args, variant, seed=seed), out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    params(
        [("int8_weights", torch.float16), *(("mxfp4", d) for d in HALF), *(("int4_zero_points", d) for d in HALF)],
        [("int8_weights", torch.float16), ("mxfp4", torch.bfloat16)],
    ),
    ids=str,
)
def test_rows_of_128_beside_few_bits(name, dtype):
    """As many as a block of experts with many rows; a block that is used to its half, and one that is used whole."""
    args = quantized_case(name, dtype, num_tokens=100, hidden=224, intermediate=96, bias=True, experts=2, top_k=1)
    args.topk_ids = (torch.arange(100)[:, None] < 40).to(args.topk_ids.dtype)
    config = tuple(TileConfig(128, columns, 64, 8, 4, 4, True) for columns in (64, 128))
    assert_correct(emulated(args, "mixed", config=config), args)


@pytest.mark.parametrize("name", ["int8_weights", "int4"])
def test_columns_that_do_not_exist_stay_zeros(name):
    """Infinity times the zeros behind the last column of act would be no number, and with it all of the result."""
    args = quantized_case(name, torch.bfloat16, num_tokens=4, intermediate=160)
    middle = 1 if name == "int8_weights" else 0x99
    args.w1, args.w2 = torch.full_like(args.w1, middle), torch.full_like(args.w2, middle)
    args.hidden_states[:] = torch.inf
    assert (emulated(args, "mixed") == torch.inf).all()


def test_given_scales_of_zero():
    assert (emulated(scales_of_zero_case(), "pingpong") == 0).all()


def test_given_scales_below_zero():
    args = negative_scales_case()
    assert_correct(emulated(args, "pingpong"), args)


def test_scales_that_bfloat16_does_not_hold():
    """They become two numbers, whose sum they are."""
    args = fine_scales_case(num_tokens=16)
    assert torch.equal(emulated(args, "mixed"), emulate(args))


@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan, 3.4e38])
def test_scales_without_a_rest(scale):
    """Of infinity, and of what bfloat16 rounds to it, there is none; else all would be no number."""
    args = one_hot_case("int4_w4a16", torch.bfloat16, num_tokens=16)
    args.w1_scale = torch.full_like(args.w1_scale, scale)
    torch.testing.assert_close(emulated(args, "mixed"), emulate(args), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["int8_weights", "int4"])
def test_copied_rows_are_in_bounds(name):
    """Rows of the last tokens, and the last part, which is not whole."""
    args = quantized_case(name, torch.bfloat16, hidden=224)
    with sanitized() as report:
        assert_correct(emulated(args, "mixed"), args)
    assert report.launches["scatter_planes_kernel"] == 1


def test_bench_times_a_variant_by_its_name():
    args = quantized_case("int8_weights", torch.bfloat16)
    with hopper() as launches:
        assert_correct(own_call(args, "mixed")(), args)
        assert launches.programs["mixed_kernel"] > 0
        with pytest.raises(ValueError, match="variant is 'pingpong', but quantization is 'int8_w8a16'"):
            own_call(args, "pingpong")()


@pytest.mark.parametrize(
    ("name", "options"),
    params(
        [
            ("fp8_block", {"hidden": 288}),
            ("fp8_block", {"hidden": 64, "scale_dtype": torch.bfloat16}),
            ("fp8_block_given", {"hidden": 288, "intermediate": 272, **OPTIONS["biases_interleaved"]}),
            ("fp8_block", {"hidden": 1040, "intermediate": 144, "scale_dtype": torch.float16, "routing": "one_expert"}),
            ("fp8_block", OPTIONS["router_weight_on_input"]),
            ("fp8_block", OPTIONS["silu_no_gate"]),
        ],
        [("fp8_block", {"hidden": 288}), ("fp8_block", {"hidden": 64, "scale_dtype": torch.bfloat16})],
    ),
    ids=str,
)
def test_rows_of_128_are_two_consumers(name, options):
    """One K step and many, blocks that gate and up share, scales of 16 bits."""
    args = quantized_case(name, torch.bfloat16, num_tokens=60, **options)
    gated = make_problem(args).activation.gated
    config = tuple(TileConfig(128, columns, 128, 16, 4, 5) for columns in (128 if gated else 256, 256))
    assert_correct(emulated(args, "blockscaled", config=config), args)


SMALL = {"dtypes": HALF, "max_tokens": 40, "max_size": 300, "max_experts": 5}
DRAWN = {
    "pingpong": calls(**SMALL),
    "pingpong quantized": calls(quantized=formats(("fp8_w8a8",), blocks=False), **SMALL),
    "blockscaled": calls(quantized=formats(("fp8_w8a8",), blocks=True), **SMALL),
    "packed": calls(quantized=formats(("int4_w4a16", "mxfp4_w4a16")), **SMALL),
    "mixed": calls(quantized=formats(("int8_w8a16", "int4_w4a16", "mxfp4_w4a16")), **SMALL),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.timeout(600 + EXAMPLES)
def test_drawn_calls(name):
    variant = name.split()[0]

    @drawing(EXAMPLES, 2 * len(DRAWN), same_up_to=300)
    @given(DRAWN[name])
    def holds(call):
        args = build(call)
        assume(runs(variant, args))
        assert_result(emulated(args, variant, seed=call.seed), args)

    holds()


# Kernels with one fault each: what the tests above would not fail for if the emulator did not see it.


@gluon.jit
def stores_a_box(x_desc, out_desc, FENCED: gl.constexpr, WAITS: gl.constexpr):
    """out = x, by TMA into shared memory, registers, shared memory again, and TMA."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    smem = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    mbarrier.expect(bar.index(0), 64 * 64 * 2)
    tma_load(x_desc, [0, 0], bar.index(0), smem)
    if WAITS:
        mbarrier.wait(bar.index(0), 0)
    x = smem.load(LAYOUT)
    smem.store(x)
    if FENCED:
        fence_async_shared()
    tma_store(out_desc, [0, 0], smem)
    tma.store_wait(0)


@gluon.jit
def multiplies(x_desc, out_ptr, WAITS: gl.constexpr, AGAIN: gl.constexpr):
    """out = the first column of x @ x^T; AGAIN: x is loaded again while it is multiplied."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    smem = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    mbarrier.expect(bar.index(0), 64 * 64 * 2)
    tma_load(x_desc, [0, 0], bar.index(0), smem)
    mbarrier.wait(bar.index(0), 0)
    zero = gl.zeros((64, 64), gl.float32, LAYOUT)
    acc = warpgroup_mma(smem, smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    if AGAIN:
        mbarrier.expect(bar.index(0), 64 * 64 * 2)
        tma_load(x_desc, [0, 0], bar.index(0), smem)
    if WAITS:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    gl.store(out_ptr + rows[:, None] * 64 + columns[None, :], acc)


@gluon.jit
def arrives(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Waits for so many arrivals after so many."""
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=COUNT)
    mbarrier.arrive(bar.index(0), count=ARRIVALS)
    mbarrier.wait(bar.index(0), 0)


@gluon.jit
def loads(x_ptr, COUNT: gl.constexpr):
    """Loads so many numbers."""
    gl.load(x_ptr + gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [4], [0])))


def box(tensor):
    return descriptor(tensor, [64, 64])


def test_right_kernels_pass():
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    out, product = torch.empty_like(x), torch.empty(64, 64)
    with hopper() as launches:
        stores_a_box[(1,)](box(x), box(out), True, True, num_warps=4)
        multiplies[(1,)](box(x), product, True, False, num_warps=4)
        arrives[(2,)](3, 3, num_warps=4)
        loads[(1,)](x, 4096, num_warps=4)
    assert torch.equal(out, x)
    torch.testing.assert_close(product, x.float() @ x.float().T)
    assert launches.programs == {"stores_a_box": 1, "multiplies": 1, "arrives": 2, "loads": 1}


FAULTS = {
    "proxy": lambda x, out: stores_a_box[(1,)](box(x), box(x.clone()), False, True, num_warps=4),
    "race: a load": lambda x, out: stores_a_box[(1,)](box(x), box(x.clone()), True, False, num_warps=4),
    "race: a TMA load": lambda x, out: multiplies[(1,)](box(x), out, True, True, num_warps=4),
    "wait": lambda x, out: multiplies[(1,)](box(x), out, False, False, num_warps=4),
    "barrier": lambda x, out: arrives[(1,)](2, 3, num_warps=4),
    "deadlock": lambda x, out: arrives[(1,)](2, 1, num_warps=4),
    "out of bounds": lambda x, out: loads[(1,)](x, 8192, num_warps=4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    for seed in range(5):
        with hopper(seed=seed), pytest.raises(HopperError, match=fault):
            FAULTS[fault](torch.randn(64, 64, dtype=torch.bfloat16), torch.empty(64, 64))


def test_it_needs_the_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), hopper():
        pass
