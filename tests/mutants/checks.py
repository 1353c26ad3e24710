"""What a mutated copy of the package has to fail; imported where the copy is the package that is found.

`main` begins with one check, goes on with all others for the same device, and names each before it starts, so that the
last name is what killed a process that crashed. Every input ends at a page that cannot be read. In the interpreter fp8
is put right first, as for tests/interp.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import moe_ops
from moe_ops import exchange
from moe_ops.arguments import Arguments
from moe_ops.devices import describe
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.quantization import quantize_activations
from moe_ops.router import make_router
from moe_ops.testing import assert_correct, assert_exact, exact_inputs, override, poisoned_memory, random_inputs
from moe_ops.testing.sanitizer import sanitized
from moe_ops.tuning import TileConfig
from tests import exchange as rows
from tests import routers
from tests.cases import option_case, run
from tests.mutants import hopper_checks
from tests.quantized import hard_rows, quantized_case, scales_of_zero_case

_PROT_NONE = 0
# Offsets of 2^30 elements: the third expert or token lies beyond int32.
_FAR = 2**30
# Two groups of 128 columns and more in either GEMM; the up half begins within a block.
_GROUPS = {"hidden": 288, "intermediate": 160}
# Without a sort: steps that are not full, in few and large programs.
_QUANTIZED_TILE = TileConfig(1, 64, 64)


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides' order whose last element is the last before an inaccessible page."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order).contiguous()
    pages = -(-dense.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = pages * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + end), ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
        raise OSError("mprotect failed")
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=dense.nbytes, offset=end - dense.nbytes)
    copy = copy.view(dense.dtype).view(dense.shape).copy_(dense)
    return copy.permute([order.index(dim) for dim in range(tensor.dim())])


def far_apart(tensor: Tensor) -> Tensor:
    """A copy whose first stride is 2^30 elements; only the pages that are touched take memory."""
    return torch.empty_strided(tensor.shape, (_FAR, *tensor.stride()[1:]), dtype=tensor.dtype).copy_(tensor)


def edit_tensors(args: Arguments, edit: Callable[[Tensor], Tensor], *names: str) -> Arguments:
    """The call with some of its tensors, or all, edited in place."""
    for name in names or args.tensors():
        setattr(args, name, edit(getattr(args, name)))
    return args


# The ways through `_row_dots`: steps that fill K; a tail in the second step (up), a step larger than K (down).
DIRECT_TILES = [TileConfig(1, 16, 8), TileConfig(1, 16, 32)]


def option(name: str, path: str) -> None:
    """An option of tests.cases through the sort."""
    args = edit_tensors(option_case(name, torch.float16), guarded)
    with override(path=path, variant="sorted"), poisoned_memory():
        assert_correct(run(args), args)


def option_without_a_sort(name: str) -> None:
    """An option of tests.cases for two tokens, without a sort."""
    args = edit_tensors(option_case(name, torch.float16, num_tokens=2, hidden=40, intermediate=24), guarded)
    for config in DIRECT_TILES:
        with override(path="classic", variant="direct", config=config), poisoned_memory():
            assert_correct(run(args), args)


def more_slots_than_a_step(variant: str) -> None:
    """top_k above the number of slots that a step takes."""
    args = random_inputs(num_tokens=2, hidden=24, intermediate=16, experts=3, top_k=19, dtype=torch.float16)
    config = DIRECT_TILES[1] if variant == "direct" else None
    with override(path="classic", variant=variant, config=config), poisoned_memory():
        assert_correct(run(edit_tensors(args, guarded)), args)


def more_row_blocks_than_a_group() -> None:
    """Row blocks in several groups, column blocks in each."""
    args = random_inputs(num_tokens=40, hidden=40, intermediate=40, experts=3, top_k=2, dtype=torch.float16)
    config = TileConfig(16, 16, 16, group_m=2)
    with override(path="classic", variant="sorted", config=config), poisoned_memory():
        assert_correct(run(args), args)


def exact(variant: str) -> None:
    """Integers, bit for bit."""
    args = exact_inputs(num_tokens=7, hidden=40, intermediate=24, experts=4, top_k=2, dtype=torch.float16)
    config = DIRECT_TILES[1] if variant == "direct" else None
    with override(path="classic", variant=variant, config=config), poisoned_memory():
        assert_exact(run(args), args)


def nothing_beside_the_result(variant: str) -> None:
    """Unsummed routes into a part of a wider buffer: the rest keeps its value."""
    args = option_case("routes_unsummed", torch.float16, num_tokens=2)
    wider = torch.full((4, 3, 88), 7.0, dtype=torch.float16)
    out = wider[1:3, :, 8:80]
    values = {name: getattr(args, name) for name in args.__slots__}
    config = DIRECT_TILES[1] if variant == "direct" else None
    with override(path="classic", variant=variant, config=config):
        torch.ops.moe_ops.fused_moe_tma_(out, **values)
    assert_correct(out, args)
    beside = torch.ones_like(wider, dtype=torch.bool)
    beside[1:3, :, 8:80] = False
    assert (wider[beside] == 7).all(), "written beside the result"


def offsets_beyond_int32(variant: str) -> None:
    """Tokens and experts 2^30 elements apart."""
    args = random_inputs(num_tokens=3, hidden=24, intermediate=16, experts=3, top_k=2, dtype=torch.float16)
    edit_tensors(args, far_apart, "hidden_states", "w1", "w2")
    config = DIRECT_TILES[1] if variant == "direct" else None
    with override(path="classic", variant=variant, config=config):
        assert_correct(run(args), args)


def sort(launches: int) -> None:
    """The sort against its definition: order, padding, inverse, ids that are no experts."""
    from moe_ops.backends import routing

    ids = torch.randint(-2, 8, (29, 5), generator=torch.Generator().manual_seed(0))
    ids[3] = torch.tensor([2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 0])
    sizes = {"SMALL_ROUTES": 10**6 if launches == 1 else 0, "CHUNK": 16, "_SCAN_STEP": 4}
    expert_map = guarded(torch.tensor([3, -1, 0, 99, 1, 2], dtype=torch.int32))
    with contextlib.ExitStack() as stack:
        for name, value in sizes.items():
            stack.enter_context(mock.patch.object(routing, name, value))
        for args in ((ids, 6, 16), (ids, 4, 3, expert_map)):
            with poisoned_memory():
                got = routing.sort_routes(*args)
            for name, mine, expected in zip(got._fields, got, moe_ops.route(*args), strict=True):
                assert torch.equal(mine, expected), f"{name} differs from its definition"


def quantized(name: str, path: str, variant: str) -> None:
    """A quantised call whose K has a short last step and a short last group in both GEMMs."""
    sizes = {"num_tokens": 2} if variant == "direct" else {"num_tokens": 6, "experts": 3}
    args = quantized_case(name, torch.float16, **_GROUPS, **sizes)
    config = _QUANTIZED_TILE if variant == "direct" else None
    with override(path=path, variant=variant, config=config), poisoned_memory():
        assert_correct(run(edit_tensors(args, guarded)), args)


def scales_that_are_nan(variant: str) -> None:
    """A NaN among the e8m0 scales of w1: all of the result for the tokens of one expert.

    All products that it scales are positive: an infinity in its place would stay one.
    """
    args = quantized_case("mxfp4", torch.float16)
    expert = args.topk_ids[0, 0]
    args.hidden_states = args.hidden_states.abs()
    args.w1[expert, 3] = 0x22
    args.w1_scale[expert, 3, 1] = 255
    config = _QUANTIZED_TILE if variant == "direct" else None
    with override(path="classic", variant=variant, config=config), poisoned_memory():
        out = run(args)
    assert out[0].isnan().all()
    assert_correct(out, args)


def rows_as_defined(name: str) -> None:
    """The quantised rows of a call, hard ones too, against their definition bit for bit."""
    from moe_ops.backends import quantize

    args = quantized_case(name, torch.float32, num_tokens=8, **_GROUPS)
    args.hidden_states = guarded(hard_rows(torch.float32, _GROUPS["hidden"]))
    problem = make_problem(args)
    with override(path="classic", variant="sorted"), poisoned_memory():
        plan = make_plan(problem, describe(args.w1.device))
        rows = quantize.empty_inputs(args, problem)
        quantize.inputs(args, problem, plan, rows)
    q, scale = quantize_activations(args.hidden_states, rows.values.dtype, problem.scheme.inputs)
    assert torch.equal(rows.scale.T.nan_to_num(7), scale.nan_to_num(7)), "the scales differ"
    assert torch.equal(rows.values.float().nan_to_num(7), q.float().nan_to_num(7)), "the rows differ"


def scales_of_zero() -> None:
    """Scales of 0 that are given."""
    with override(path="classic", variant="sorted"), poisoned_memory():
        assert (run(scales_of_zero_case()) == 0).all()


def router(logits: Tensor, top_k: int, bias: Tensor | None, options: dict) -> None:
    """The router against its definition: the same experts in the same order, and their weights."""
    from moe_ops.backends.topk import topk_route

    with sanitized(), poisoned_memory():
        weights, ids = topk_route(logits, bias, make_router(logits, top_k, bias, **options))
    routers.check(weights, ids, logits.contiguous(), top_k, bias, options)


def down_gemm_in_parts() -> None:
    """Parts of K of one step, the third of them short, and one of none."""
    args = quantized_case("int4", torch.float32, num_tokens=2, bias=True, hidden=64, intermediate=288)
    with override(path="classic", variant="sorted", splits=4), poisoned_memory():
        out = run(args)
    assert_correct(out, args)


def router_case(name: str) -> None:
    """A router of tests.routers: ties, NaN, infinities."""
    logits, top_k, bias, options = routers.draw(name, 9)
    router(guarded(logits), top_k, None if bias is None else guarded(bias), options)


def router_strides() -> None:
    """Experts that are not neighbours; tokens 2^30 elements apart."""
    logits, *others = routers.draw("mixtral", 3, torch.float16)
    router(guarded(logits.T.contiguous()).T, *others)
    router(far_apart(logits), *others)


def place(top_k: int, capacity: int) -> None:
    """Rows of the send buffer against their definition: ids that are no expert's, ranks without rows or room."""
    from moe_ops.backends import exchange as backend

    ids = rows.draw(13, top_k)[2]
    with sanitized(), poisoned_memory():
        got = backend.place_rows(ids, *rows.TABLES, rows.RANKS, capacity)
    for mine, expected in zip(got, exchange.place_rows(ids, *rows.TABLES, rows.RANKS, capacity), strict=True):
        assert torch.equal(mine, expected)


def pack(
    capacity: int | None, form: str, dtype: torch.dtype = torch.float32, edit: Callable[[Tensor], Tensor] = guarded,
    **sizes,
) -> None:  # fmt: skip
    """The rows that are sent against their definition."""
    from moe_ops.backends import exchange as backend

    arguments = rows.pack_arguments(capacity, form, dtype, **sizes)
    hidden, *others = arguments
    others = [guarded(value) if isinstance(value, Tensor) else value for value in others]
    # The sanitizer knows a memory by one dtype, and the words of a row are 32 bits beside values of any size.
    with sanitized() if others[-2].itemsize == 4 else contextlib.nullcontext(), poisoned_memory():
        payload = backend.pack_rows(edit(hidden), *others)
    rows.check_packed(payload, arguments)


def combine(back: Tensor, placed: Tensor) -> None:
    """The sum of rows that come back against its definition."""
    from moe_ops.backends import exchange as backend

    with sanitized(), poisoned_memory():
        got = backend.combine_rows(back, placed, back.shape[1], torch.float32)
    expected = exchange.combine_rows(back, placed, back.shape[1], torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def halve(partial: Tensor, first: int, count: int) -> None:
    """Partial sums in 16 bits against their definition."""
    from moe_ops.backends import exchange as backend

    with poisoned_memory():
        payload = backend.halve_rows(partial, first, count)
    rows.check_halved(payload, exchange.halve_rows(partial, first, count), partial, first, count)


def sum_ranks(rank: int) -> None:
    """The sum of every rank's partial sums against its definition."""
    from moe_ops.backends import exchange as backend

    generator = torch.Generator().manual_seed(rank)
    own, others = (torch.randn(n, 136, generator=generator) for n in (3, 6))
    back = exchange.halve_rows(others * 10.0 ** torch.arange(-3, 3)[:, None], 0, 0)
    got = backend.sum_ranks(own, back, rank, torch.float32)
    torch.testing.assert_close(got, exchange.sum_ranks(own, back, rank, torch.float32), rtol=0, atol=0)


SORTED_OPTIONS = [
    "plain", "tails_in_both_dimensions", "hostile_ids_int32", "routes_unsummed", "biases_interleaved", "n_major",
    "router_weight_on_input", "swigluoai", "swigluoai_own_slope", "silu_clamped", "relu2_no_gate", "scaled",
]  # fmt: skip
DIRECT_OPTIONS = ["plain", "hostile_ids_int64", "biases_interleaved", "routes_unsummed"]
QUANTIZED_FORMATS = [
    "fp8_block", "fp8_static_expert", "int8_channel", "int8_weights_zero_points", "int4", "int4_zero_points", "mxfp4",
]  # fmt: skip
CHECKS = {
    "sort in one launch": partial(sort, 1),
    "sort in three launches": partial(sort, 3),
    **{f"classic {name}": partial(option, name, "classic") for name in SORTED_OPTIONS},
    **{f"tma {name}": partial(option, name, "tma") for name in SORTED_OPTIONS[:6]},
    **{f"direct {name}": partial(option_without_a_sort, name) for name in DIRECT_OPTIONS},
    "row blocks in groups": more_row_blocks_than_a_group,
    "down GEMM in parts": down_gemm_in_parts,
    **{
        f"{check.__name__.replace('_', ' ')}, {variant}": partial(check, variant)
        for check in (more_slots_than_a_step, exact, nothing_beside_the_result, offsets_beyond_int32)
        for variant in ("sorted", "direct")
    },
    **{f"classic {name}": partial(quantized, name, "classic", "sorted") for name in QUANTIZED_FORMATS},
    **{f"tma {name}": partial(quantized, name, "tma", "sorted") for name in ("fp8_block", "int4_zero_points")},
    **{
        f"direct {name}": partial(quantized, name, "classic", "direct")
        for name in ("fp8_block_given", "int4", "int4_zero_points")
    },
    **{f"scales that are nan, {variant}": partial(scales_that_are_nan, variant) for variant in ("sorted", "direct")},
    **{f"rows of {name}": partial(rows_as_defined, name) for name in ("fp8_channel", "fp8_block", "int8_channel")},
    "scales of zero": scales_of_zero,
    **{f"router {name}": partial(router_case, name) for name in routers.ROUTERS},
    **{f"router {name}": lambda draw=draw: router(*draw()) for name, draw in routers.EDGES.items()},
    "router strides": router_strides,
    "place": partial(place, 5, 0),
    "place, 3 rows a rank": partial(place, 5, 3),
    "pack plain, a row a token": partial(pack, None, "plain"),
    "pack plain, uneven splits": partial(pack, 0, "plain"),
    "pack plain, 3 rows a rank": partial(pack, 3, "plain"),
    "pack plain, 16 rows a rank": partial(pack, 16, "plain"),
    "pack given, 3 rows a rank": partial(pack, 3, "given"),
    "pack wide plain": partial(pack, 3, "plain", num_tokens=5, hidden=2184),
    "pack wide group": partial(pack, 3, "group", num_tokens=5, hidden=2184),
    "pack far apart": partial(pack, 0, "plain", torch.float16, far_apart, num_tokens=3),
    "combine": lambda: combine(*rows.returned(torch.float32)),
    "combine wide": lambda: combine(*rows.returned(torch.float32, 2184)),
    "halve": lambda: halve(rows.extremes(136), 3, 4),
    "sum ranks": lambda: sum_ranks(1),
    "combine far apart": lambda: combine(far_apart(torch.randn(3, 40).half()), rows.FAR_ROWS),
}


def main(first: str) -> None:
    """Runs all checks of a kind, `first` first; the first that fails ends the process."""
    copy = Path(moe_ops.__file__).resolve().parent.parent
    assert copy == Path.cwd().resolve(), f"moe_ops is that of {copy}, not the copy"
    (checks,) = (kind for kind in (CHECKS, *hopper_checks.KINDS) if first in kind)
    if os.environ["TRITON_INTERPRET"] == "1":
        from tests.interp.mended import mend

        mend()
    for name in sorted(checks, key=lambda name: name != first):
        print(name, flush=True)
        checks[name]()
