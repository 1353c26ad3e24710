"""Memory safety: guards around every tensor, hostile memory left by others, Triton's own checks; on every variant."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.problem import make_problem
from moe_ops.testing import assert_correct, random_inputs
from tests.cases import run
from tests.gpu.repeats import CASES, SHAPES

GUARD = 4096

# What memory around and in tensors holds. As a float every byte pattern of ones is NaN, and not the NaN that kernels
# write. As an id 0 is an expert: one that is read past the end then counts. As a workspace's number it is far off.
ONES, ZEROS, FAR = 0xFF, 0x00, 0x7F

# TMA steps over rows in units of 8 elements.
_ROW_UNIT = 8
# Their rows may have a gap behind them; the op copies the others, if they are not contiguous.
_STRIDED = {"hidden_states", "w1", "w2", "w1_bias", "w2_bias"}


class Guards:
    """Tensors that lie inside larger buffers, and what is left of the bytes around them."""

    def __init__(self) -> None:
        self._buffers = []

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: int, gap: int = 0) -> Tensor:
        """A tensor full of the byte `fill`, `gap` elements from the end of a row to the next, bytes `fill` around."""
        row = shape[-1] + gap
        num_bytes = torch.Size(shape[:-1]).numel() * row * dtype.itemsize
        buffer = torch.full((num_bytes + 2 * GUARD,), fill, dtype=torch.uint8, device="cuda")
        body = buffer[GUARD : GUARD + num_bytes]
        edges = {"before": buffer[:GUARD], "after": buffer[GUARD + num_bytes :]}
        if gap:
            edges["between the rows of"] = body.view(-1, row * dtype.itemsize)[:, shape[-1] * dtype.itemsize :]
        self._buffers += [(f"{where} {name} {list(shape)}", edge, fill) for where, edge in edges.items()]
        return body.view(dtype).view(*shape[:-1], row)[..., : shape[-1]]

    def place(self, args: Arguments, *, gaps: bool) -> Arguments:
        """The same call on guarded tensors; with `gaps`, guards behind every row too."""
        placed = {}
        for name, tensor in args.tensors().items():
            gap = _ROW_UNIT + -tensor.shape[-1] % _ROW_UNIT if gaps and name in _STRIDED else 0
            fill = ONES if tensor.is_floating_point() else ZEROS
            placed[name] = self.empty(name, tensor.shape, tensor.dtype, fill, gap).copy_(tensor)
        return replace(args, **placed)

    def new_empty(self, like: Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
        """Stands in for `Tensor.new_empty`, through which the package takes results and workspaces."""
        dtype = dtype or like.dtype
        return self.empty("workspace", size, dtype, ONES if dtype.is_floating_point else FAR)

    def touched(self) -> list[str]:
        """Where bytes changed that belong to nobody."""
        return [where for where, edge, fill in self._buffers if (edge != fill).any()]

    def __len__(self) -> int:
        return len(self._buffers)


def make_call(case, gaps: bool) -> Arguments:
    """Whole tiles without gaps; tails and odd sizes, as far as the variant takes them, with gaps."""
    shape, num_tokens = SHAPES[gaps], case.tokens[gaps]
    if gaps:
        # Ping-pong copies 8 elements of x at a time.
        shape = {**shape, "hidden": 1000 if case.variant == "pingpong" else 1001, "intermediate": 361}
    return random_inputs(num_tokens=num_tokens, experts=16, top_k=4, device="cuda", routing="duplicates", **shape)


def run_into(out: Tensor, args: Arguments) -> None:
    torch.ops.moe_ops.fused_moe_tma_(out, **{name: getattr(args, name) for name in args.__slots__})


@pytest.mark.parametrize("gaps", [False, True], ids=["packed", "gaps"])
def test_guards(case, gaps, monkeypatch):
    args, guards = make_call(case, gaps), Guards()
    placed = guards.place(args, gaps=gaps)
    problem = make_problem(placed)
    # Rows of the caller's buffer start anywhere: 7 elements are no unit of anything.
    outs = [guards.empty("out", problem.out_shape, problem.out_dtype, ONES, gap) for gap in (0, 7)]
    edges_before = len(guards)
    with case.override(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda like, size, **kwargs: guards.new_empty(like, size, **kwargs))
        for out in outs:
            run_into(out, placed)
        outs.append(run(placed))
    torch.cuda.synchronize()
    assert guards.touched() == []
    # Two edges each: a result, and in each of three calls act; in the sorted variants rows and the routing's four too.
    assert len(guards) - edges_before >= 2 * (1 + 3 * (1 if case.variant == "direct" else 6)), "the patch missed some"
    for name, tensor in placed.tensors().items():
        assert torch.equal(tensor, getattr(args, name)), f"{name} was changed"
    assert_correct(outs[0], args)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("where", ["before", "after", "between the rows of"])
def test_guards_are_seen(where):
    """A byte written past an edge, on every side."""
    guards = Guards()
    tensor = guards.empty("planted", (3, 5), torch.bfloat16, ONES, 8)
    assert guards.touched() == []
    offset = {"before": -1, "after": 3 * 13, "between the rows of": 5}[where]
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset() + offset, (1,)
    )
    whole.zero_()
    assert [touched.split(" planted")[0] for touched in guards.touched()] == [where]


def test_memory_others_left(case):
    """NaN in everything the allocator hands out, whether or not it comes from where `Guards` looks."""
    args = make_call(case, gaps=False)
    with case.override():
        expected = run(args)
        torch.cuda.empty_cache()
        # Below 1 MiB the allocator takes from segments of their own.
        blocks = [torch.full((size,), float("nan"), device="cuda") for size in (*64 * [2**17], 2**28)]
        del blocks
        out = run(args)
    assert torch.equal(out, expected)
    assert_correct(out, args)


@pytest.mark.timeout(240)
@pytest.mark.own_process(TRITON_DEBUG="1")
def test_triton_debug():
    """Overflows of int32 and failed assertions of the device trap: they would take the process with them."""
    import triton

    assert triton.knobs.runtime.debug
    for name, case in CASES.items():
        args = Guards().place(make_call(case, gaps=True), gaps=True)
        with case.override():
            out = run(args)
        assert_correct(out, args)
        print(name, "ok", flush=True)
