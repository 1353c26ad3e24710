"""The sanitizer finds each kind of fault in a kernel that has it, and none in kernels that have not."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops.backends import pipeline
from moe_ops.testing import assert_correct, override, random_inputs
from moe_ops.testing.sanitizer import SanitizerError, sanitized
from moe_ops.tuning import TileConfig
from tests.cases import option_case, run


@triton.jit
def copy_rows(x_ptr, ids_ptr, out_ptr, stride, n, LOADED: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """out[program] = x[ids[program]], with masks that are too wide where LOADED or STORED is above 0."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + tl.program_id(0))
    x = tl.load(x_ptr + row * stride + columns, mask=columns < n + LOADED, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * n + columns, x, mask=columns < n + STORED)


def copy(ids=(0, 3), x=None, out=None, stride=12, loaded=0, stored=0):
    x = torch.randn(4, 12) if x is None else x
    out = torch.zeros(2, 12) if out is None else out
    copy_rows[(2,)](x, torch.tensor(ids, dtype=torch.int32), out, stride, 12, loaded, stored, 16)
    return out


def test_a_right_kernel_passes_and_is_watched():
    x = torch.randn(4, 12)
    with sanitized() as report:
        out = copy(x=x)
        copy(x=x)
    assert torch.equal(out, x[[0, 3]])
    assert report.launches == {"copy_rows": 2}
    assert (report.loads, report.stores) == (2 * 2 * 13, 2 * 2 * 12)


@pytest.mark.parametrize(
    "faulty,argument,offset,program",
    [
        ({"ids": (0, 4)}, "x_ptr", 48, 1),
        ({"ids": (-1, 0)}, "x_ptr", -12, 0),
        ({"ids": (3, 3), "loaded": 1}, "x_ptr", 48, 0),
        ({"stored": 1}, "out_ptr", 24, 1),
        ({"x": torch.zeros(4, 20)[:, :12], "stride": 20, "loaded": 1}, "x_ptr", 12, 0),
        ({"x": torch.zeros(0, 12)}, "x_ptr", 0, 0),
        ({"x": torch.zeros(4, 12)[::2]}, "x_ptr", 36, 1),
    ],
    ids=["id E", "id -1", "load one past", "store one past", "gap of a view", "no elements", "wrong stride"],
)
def test_out_of_bounds(faulty, argument, offset, program):
    # A store into the next program's row is a race before it leaves the tensor: one program's alone is not.
    with pytest.raises(SanitizerError, match="out of bounds: copy_rows") as caught, sanitized():
        copy(**faulty)
    fault = caught.value
    assert (fault.argument, fault.offset, fault.program) == (argument, offset, (program, 0, 0))
    assert "test_sanitizer.py" in fault.line
    assert f"tl.{'store' if argument == 'out_ptr' else 'load'}({argument}" in fault.line


def test_a_step_into_the_neighbouring_tensor_is_out_of_bounds():
    both = torch.zeros(8, 12)
    with sanitized():
        copy(ids=(4, 7), x=both)
    with pytest.raises(SanitizerError, match="out of bounds"), sanitized():
        copy(ids=(4, 7), x=both[:4], out=both[4:6].clone())


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 12).expand(4, 12), torch.zeros(20).as_strided((4, 12), (2, 1)), torch.zeros(99)[3:51]], ids=str
)
def test_expanded_overlapping_and_offset_views_are_in_bounds(x):
    with sanitized():
        copy(x=x, stride=0 if x.stride(0) == 0 else 2)


@triton.jit
def overlapping_stores(out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * STEP + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit
def neighbours_value(out_ptr):
    tl.store(out_ptr + tl.program_id(0), 1.0)
    tl.load(out_ptr + tl.maximum(tl.program_id(0), 1) - 1)


def test_race():
    out = torch.zeros(32)
    with sanitized():
        overlapping_stores[(2,)](out, 16, 16)
        overlapping_stores[(2,)](out, 16, 16)  # another launch may
    with pytest.raises(SanitizerError, match="race: overlapping_stores") as caught, sanitized():
        overlapping_stores[(2,)](out, 15, 16)
    assert (caught.value.argument, caught.value.offset, caught.value.program) == ("out_ptr", 15, (1, 0, 0))
    with pytest.raises(SanitizerError, match=r"race: .* loads") as caught, sanitized():
        neighbours_value[(2,)](out)
    assert caught.value.offset == 0


@triton.jit
def store_then_load(workspace_ptr, out_ptr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(workspace_ptr + offsets, offsets.to(tl.float32), mask=offsets < STORED)
    tl.store(out_ptr + offsets, tl.load(workspace_ptr + offsets))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(16),
        lambda: torch.zeros(2).new_empty(16),
        lambda: torch.empty_like(torch.zeros(16)),
        lambda: torch.empty_strided((16,), (1,)),
        lambda: torch.zeros(2).new_empty_strided((16,), (1,)),
    ],
    ids=["empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"],
)
def test_uninitialised(allocate):
    out = torch.zeros(16)
    with sanitized():
        store_then_load[(1,)](allocate(), out, 16, 16)
        store_then_load[(1,)](allocate().zero_(), out, 3, 16)  # written by torch
        store_then_load[(1,)](torch.zeros(16), out, 3, 16)
    with pytest.raises(SanitizerError, match="uninitialised: store_then_load") as caught, sanitized():
        store_then_load[(1,)](allocate(), out, 15, 16)
    assert (caught.value.argument, caught.value.offset) == ("workspace_ptr", 15)
    assert "tl.load(workspace_ptr" in caught.value.line


def test_what_a_kernel_writes_is_written_whatever_its_value():
    with sanitized():
        poison = torch.empty(16, dtype=torch.uint8)
        out = torch.empty(16, dtype=torch.uint8)
        store_bytes[(1,)](poison, poison[0].item())
        store_then_load[(1,)](poison, out, 0, 16)


@triton.jit
def store_bytes(out_ptr, value):
    tl.store(out_ptr + tl.arange(0, 16), (tl.zeros((16,), tl.int32) + value).to(tl.uint8))


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow(sign):
    """With tiny tensors: the offset never becomes an address."""
    with pytest.raises(SanitizerError, match="overflow: copy_rows") as caught, sanitized():
        copy(stride=sign * 2**30)
    assert str(sign * 3 * 2**30) in str(caught.value)
    assert "row * stride" in caught.value.line


@triton.jit
def row_blocks(out_ptr, first, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The program ids of a huge grid's last programs, without the others."""
    program = tl.program_id(0) + first
    rows = (program.to(tl.int64) if WIDE else program) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, 1.0, mask=rows < 0)


def test_overflow_of_late_programs():
    out = torch.zeros(1)
    with sanitized():
        row_blocks[(2,)](out, 2**27, True, 16)
        row_blocks[(1,)](out, 2**27 - 1, False, 16)
    with pytest.raises(SanitizerError, match="overflow") as caught, sanitized():
        row_blocks[(2,)](out, 2**27 - 1, False, 16)
    assert caught.value.program == (1, 0, 0)


@triton.jit
def descriptor_copy(x_desc, out_desc, row):
    out_desc.store([row, 0], x_desc.load([row, 0]))


def test_descriptors_are_clipped_and_then_held_against_their_tensor():
    x, out = torch.randn(6, 12), torch.zeros(6, 12)
    with sanitized() as report:
        descriptor_copy[(1,)](TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(out, [8, 16]), 0)
    assert torch.equal(out, x) and report.loads == report.stores == x.numel()
    too_long = TensorDescriptor(x, [7, 12], [12, 1], [8, 16])
    with pytest.raises(SanitizerError, match="out of bounds") as caught, sanitized():
        descriptor_copy[(1,)](too_long, TensorDescriptor.from_tensor(out, [8, 16]), 0)
    assert (caught.value.argument, caught.value.offset) == ("x_desc", 72)


def test_a_box_may_hold_some_uninitialised_rows_but_not_only_such():
    x, out = torch.randn(6, 12), torch.zeros(6, 12)
    with sanitized():
        workspace = torch.empty(16, 12)
        x_desc, workspace_desc, out_desc = (TensorDescriptor.from_tensor(t, [8, 16]) for t in (x, workspace, out))
        descriptor_copy[(1,)](x_desc, workspace_desc, 0)
        descriptor_copy[(1,)](workspace_desc, out_desc, 0)
        fresh = TensorDescriptor.from_tensor(torch.empty(16, 12), [8, 16])
        with pytest.raises(SanitizerError, match="uninitialised: descriptor_copy"):
            descriptor_copy[(1,)](fresh, out_desc, 0)


def test_everything_is_put_back():
    functions = (torch.empty, torch.Tensor.new_empty, triton.runtime.interpreter._implicit_cvt)
    with pytest.raises(ZeroDivisionError), sanitized():
        raise ZeroDivisionError
    assert functions == (torch.empty, torch.Tensor.new_empty, triton.runtime.interpreter._implicit_cvt)
    assert "new_empty" not in vars(torch.Tensor)


def test_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), sanitized():
        pass


# The op.

OPTIONS = ["plain", "hostile_ids_int64", "n_major_interleaved", "biases", "routes_unsummed"]
PATHS = pytest.mark.parametrize("path", ["classic", "tma"])
# Fewer and larger programs than the heuristic's: the interpreter's time goes by the number of steps.
DIRECT = TileConfig(1, 64, 128)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("variant", ["sorted", "direct"])
@PATHS
def test_the_op(name, variant, path):
    args = option_case(name, torch.float16)
    with override(path=path, variant=variant, config=DIRECT if variant == "direct" else None), sanitized() as report:
        out = run(args)
    assert_correct(out, args)
    kernels = {"gemv_up_kernel", "gemv_down_kernel"}
    if variant == "sorted":
        kernels = {"route_small_kernel", "up_kernel", "down_kernel", "combine_kernel"}
    assert set(report.launches) == kernels and report.loads > 0 and report.stores > 0


@pytest.mark.parametrize("variant", ["sorted", "direct"])
@PATHS
def test_offsets_above_2_31(monkeypatch, variant, path):
    """Every tensor's rows lie 2^29 elements apart, in memory of which only the pages in use exist."""
    step = 2**29

    def spread(tensor):
        far = torch.empty((tensor.shape[0] - 1) * step + tensor[0].numel(), dtype=tensor.dtype)
        view = far.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride()))
        return view.copy_(tensor)

    args = random_inputs(num_tokens=5, hidden=40, intermediate=24, experts=5, top_k=1, dtype=torch.float16, bias=True)
    args.topk_ids = torch.tensor([[4], [2], [0], [4], [4]], dtype=torch.int32)
    expected = run(args, path="reference")
    for name in ("hidden_states", "w1", "w2", "w1_bias", "w2_bias"):
        setattr(args, name, spread(getattr(args, name)))
    out = spread(torch.zeros(5, 40, dtype=torch.float16))
    workspaces = [spread(torch.zeros(5, columns, dtype=torch.float16)) for columns in (24, 40)]
    if variant == "direct":
        monkeypatch.setattr(pipeline, "_workspace", lambda args, problem, plan, columns: workspaces[columns == 40])
    config = DIRECT if variant == "direct" else None
    with override(path=path, variant=variant, config=config), sanitized():
        values = {name: getattr(args, name) for name in args.__slots__}
        torch.ops.moe_ops.fused_moe_tma_(out, **values)
    assert torch.allclose(out, expected, atol=0.02)
