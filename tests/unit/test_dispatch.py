"""Path, tiles and workspace as pure functions of a call and a device; no device is needed."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops import dispatch
from moe_ops.activations import ACTIVATIONS
from moe_ops.arguments import Arguments
from moe_ops.devices import Device, describe
from moe_ops.dispatch import Override, choose_path, make_plan, row_stride
from moe_ops.problem import Problem, make_problem
from moe_ops.routing import empty_routing, max_row_blocks
from moe_ops.tuning import TileConfig, tile_configs
from moe_ops.tuning.heuristics import fit

KIB = 1024


def gpu(name: str, capability: tuple[int, int] | None, shared_memory: int, **facts) -> Device:
    return Device("cuda", name, capability, 100, shared_memory, **{"triton": "3.9.0", "has_descriptors": True, **facts})


H100 = gpu("H100", (9, 0), 227 * KIB)
H200 = gpu("H200", (9, 0), 227 * KIB)
A100 = gpu("A100", (8, 0), 163 * KIB)
RTX_4090 = gpu("RTX 4090", (8, 9), 99 * KIB)
B200 = gpu("B200", (10, 0), 227 * KIB)
RTX_5090 = gpu("RTX 5090", (12, 0), 101376)
MI300X = gpu("MI300X", None, 64 * KIB)
CPU = Device("cpu", "cpu")
INTERPRETER = Device("cpu", "cpu", shared_memory=227 * KIB, triton="3.9.0", has_descriptors=True, interpreted=True)
WITH_TMA = [H100, H200, B200, RTX_5090]
WITHOUT_TMA = [A100, RTX_4090, MI300X]
GPUS = [*WITH_TMA, *WITHOUT_TMA]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def by_name(value):
    return value.name if isinstance(value, Device) else None


def problem(
    m: int = 64,
    h: int = 128,
    i: int = 96,
    e: int = 8,
    top_k: int = 2,
    dtype=torch.bfloat16,
    w1=None,
    w2=None,
    **options,
) -> Problem:
    """Describes a call. Its tensors have no memory, so the weights' addresses are 0: as aligned as can be."""
    rows = i if options.get("activation", "").endswith("_no_gate") else 2 * i

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w1, w2 = empty(e, rows, h) if w1 is None else w1, empty(e, h, i) if w2 is None else w2
    ids = empty(m, top_k, dtype=torch.int32)
    return make_problem(Arguments(empty(m, h), w1, w2, empty(m, top_k), ids, **options), traced=True)


def n_major(*shape: int) -> torch.Tensor:
    """A weight [E, N, K] stored as [E, K, N]."""
    return torch.empty(shape[0], shape[2], shape[1], dtype=torch.bfloat16, device="meta").mT


# Which path.


@pytest.mark.parametrize("device", WITH_TMA, ids=by_name)
@pytest.mark.parametrize("path", ["auto", "tma"])
def test_tma_where_the_device_has_it(device, path):
    chosen, reason = choose_path(problem(path=path), device)
    assert chosen == "tma"
    assert reason == "asked for" if path == "tma" else "TMA" in reason


@pytest.mark.parametrize("device", GPUS, ids=by_name)
def test_classic_can_be_asked_for_on_every_gpu(device):
    assert choose_path(problem(path="classic"), device) == ("classic", "asked for")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (A100, ["A100", "compute capability 8.0", "TMA needs 9.0"]),
        (RTX_4090, ["RTX 4090", "compute capability 8.9", "TMA needs 9.0"]),
        (MI300X, ["MI300X", "not an NVIDIA GPU"]),
        (replace(H200, has_descriptors=False, triton="3.1.0"), ["Triton 3.1.0", "TMA descriptors", "triton>=3.6"]),
    ],
    ids=["A100", "RTX 4090", "MI300X", "old-triton"],
)
def test_devices_without_tma(device, words):
    path, reason = choose_path(problem(), device)
    assert path == "classic"
    with pytest.raises(ValueError) as error:
        choose_path(problem(path="tma"), device)
    message = str(error.value)
    for word in words:
        assert word in reason and word in message
    assert message.startswith("path is 'tma', but ") and message.endswith("pass path='auto' or path='classic'")


BF16 = torch.empty(0, dtype=torch.bfloat16, device="meta")
UNDESCRIBABLE = {
    "w1-address": (replace(problem(), w1_address=8), "w1 starts 8 bytes past a multiple of 16"),
    "w2-address": (replace(problem(), w2_address=4098), "w2 starts 2 bytes past a multiple of 16"),
    "odd-hidden-size": (problem(h=511), "w1.stride(1) is 1022 bytes, not a positive multiple of 16"),
    "odd-intermediate-size": (problem(i=89), "w2.stride(1) is 178 bytes, not a positive multiple of 16"),
    "experts-apart": (
        problem(w1=BF16.new_empty(8, 192 * 128 + 4).as_strided((8, 192, 128), (192 * 128 + 4, 128, 1))),
        f"w1.stride(0) is {2 * (192 * 128 + 4)} bytes",
    ),
    "one-expert-for-all": (problem(w2=BF16.new_empty(1, 128, 96).expand(8, 128, 96)), "w2.stride(0) is 0 bytes"),
    "every-other-column": (problem(w1=BF16.new_empty(8, 192, 256)[..., ::2]), "rows or columns that are contiguous"),
    "n-major-w1": (problem(i=90, w1=n_major(8, 180, 128)), "w1.stride(2) is 360 bytes"),
    "n-major-w2": (problem(h=132, w1=n_major(8, 192, 132), w2=n_major(8, 132, 96)), "w2.stride(2) is 264 bytes"),
    "n-major-up-half": (problem(i=92, w1=n_major(8, 184, 128)), "w1's up half starts 184 bytes into a column"),
    "n-major-odd-up-half": (replace(problem(i=8, w1=n_major(8, 16, 128)), intermediate_size=7), "up half starts 14"),
}


@pytest.mark.parametrize(("call", "words"), UNDESCRIBABLE.values(), ids=UNDESCRIBABLE)
@pytest.mark.parametrize("device", [H200, B200], ids=by_name)
def test_weights_that_tma_cannot_reach(call, words, device):
    path, reason = choose_path(call, device)
    assert path == "classic" and reason.startswith("no TMA: ") and words in reason
    with pytest.raises(ValueError, match=r"^path is 'tma', but .*; pass path='auto' or path='classic'$") as error:
        choose_path(replace(call, path="tma"), device)
    assert words in str(error.value)


DESCRIBABLE = {
    "k-major": problem(),
    "n-major": problem(w1=n_major(8, 192, 128), w2=n_major(8, 128, 96)),
    "n-major-interleaved": problem(i=92, w1=n_major(8, 184, 128), w2=n_major(8, 128, 92), gate_up_layout="interleaved"),
    "n-major-no-gate": problem(i=104, w1=n_major(8, 104, 128), activation="relu2_no_gate"),
    "padded-rows": problem(w1=BF16.new_empty(8, 192, 136)[..., :128]),
    "one-expert": problem(e=1),
    "no-tokens": problem(m=0),
}


@pytest.mark.parametrize("call", DESCRIBABLE.values(), ids=DESCRIBABLE)
def test_weights_that_tma_can_reach(call):
    assert choose_path(call, H200)[0] == "tma"


@pytest.mark.parametrize("device", WITH_TMA, ids=by_name)
def test_float32_is_ieee_and_so_classic(device):
    path, reason = choose_path(problem(dtype=torch.float32), device)
    assert path == "classic" and "float32" in reason and "IEEE" in reason
    with pytest.raises(ValueError, match="float32 is computed in IEEE"):
        choose_path(problem(dtype=torch.float32, path="tma"), device)


def test_cpu():
    assert choose_path(problem(), CPU) == ("cpu", "the tensors are on the CPU")
    assert choose_path(problem(path="reference"), CPU) == ("reference", "asked for")
    for path in ("tma", "classic"):
        with pytest.raises(
            ValueError, match=f"^path is '{path}', but the tensors are on the CPU; move them .*path='auto'"
        ):
            choose_path(problem(path=path), CPU)


def test_interpreter_takes_cpu_tensors():
    assert choose_path(problem(), INTERPRETER)[0] == "cpu"
    for path, dtype in itertools.product(("tma", "classic"), DTYPES):
        assert choose_path(problem(path=path, dtype=dtype), INTERPRETER)[0] == path
    with pytest.raises(ValueError, match="w1 starts 8 bytes"):
        choose_path(replace(problem(path="tma"), w1_address=8), INTERPRETER)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose_path(problem(path="classic"), replace(INTERPRETER, triton=None, has_descriptors=False))


@pytest.mark.parametrize("path", ["auto", "tma", "classic"])
def test_gpu_without_triton(path):
    device = replace(H200, triton=None, has_descriptors=False)
    with pytest.raises(ValueError, match=r"install triton>=3\.6"):
        choose_path(problem(path=path), device)
    assert choose_path(problem(path="reference"), device)[0] == "reference"


@pytest.mark.parametrize("path", ["auto", "tma", "classic"])
def test_other_device_types(path):
    with pytest.raises(
        ValueError, match="no kernels for device type 'xpu'; move the tensors to a CUDA device or the CPU"
    ):
        choose_path(problem(path=path), Device("xpu"))


def test_this_machines_cpu():
    assert make_plan(problem(), describe(torch.device("cpu"))).path == "cpu"


# Tiles and workspace.


def stage_bytes(config: TileConfig, dtype: torch.dtype, gated: bool) -> int:
    """Rows and weights of all stages of the pipeline."""
    columns = 2 * config.block_n if gated else config.block_n
    return config.num_stages * config.block_k * (config.block_m + columns) * dtype.itemsize


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([*GPUS, INTERPRETER]),
    st.sampled_from(DTYPES),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(["tma", "classic"]),
    st.integers(0, 1 << 18),
    st.sampled_from([1, 2, 8, 60, 128, 513]),
    st.sampled_from([1, 2, 6, 8, 22]),
    st.booleans(),
)
def test_tiles_fit_shared_memory(device, dtype, activation, path, m, e, top_k, invariant):
    call = problem(m=m, e=e, top_k=top_k, dtype=dtype, activation=activation)
    up, down = tile_configs(call, device, path, batch_invariant=invariant)
    assert up.block_m == down.block_m
    assert stage_bytes(up, dtype, call.activation.gated) < device.shared_memory
    assert stage_bytes(down, dtype, False) < device.shared_memory
    # A TMA box has at most 256 elements along each dimension; interleaved gate and up rows share one.
    assert max(up.block_n * (2 if call.activation.gated else 1), down.block_n, up.block_k, down.block_k) <= 256
    assert min(up.block_k, down.block_k) >= 32


def test_tiles_follow_the_rows_of_an_expert():
    blocks = [make_plan(problem(m=m, e=8, top_k=1), A100).block_m for m in (1, 64, 128, 384, 1 << 16)]
    assert blocks == [1, 16, 32, 64, 128]
    # Few tokens meet few experts: what counts is the rows of those.
    assert make_plan(problem(m=4, e=256, top_k=8), H200).block_m == 16


def test_fit_gives_up_on_a_device_too_small():
    with pytest.raises(ValueError, match=r"no tile fits into 4096 bytes of shared memory on tiny"):
        fit(TileConfig(64, 64, 64), gpu("tiny", (9, 0), 4096), 2, gated=True)


@pytest.mark.parametrize("device", GPUS, ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance_is_tiles_that_ignore_the_tokens(device, dtype, monkeypatch):
    sizes = (0, 1, 2, 3, 17, 64, 100, 1000, 4096, 1 << 17)
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    plans = [make_plan(problem(m=m, dtype=dtype), device) for m in sizes]
    assert len({(plan.path, plan.variant, plan.up, plan.down) for plan in plans}) == 1
    monkeypatch.delenv("MOE_OPS_BATCH_INVARIANT")
    plans = [make_plan(problem(m=m, dtype=dtype), device) for m in sizes]
    assert len({(plan.up, plan.down) for plan in plans}) > 1


def test_batch_invariance_takes_only_a_switch(monkeypatch):
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "maybe")
    with pytest.raises(ValueError, match=r"^MOE_OPS_BATCH_INVARIANT is 'maybe', expected one of 1, true"):
        make_plan(problem(), H200)


@pytest.mark.parametrize("path", ["tma", "classic"])
@pytest.mark.parametrize("m", [0, 1, 7, 1000])
@pytest.mark.parametrize(("h", "i", "dtype"), [(128, 96, torch.bfloat16), (56, 72, torch.float16)])
def test_workspace_is_what_the_pipeline_allocates(path, m, h, i, dtype):
    act_bytes, row_bytes = (row_stride(columns) * dtype.itemsize for columns in (i, h))
    with dispatch.override(Override(variant="sorted")):
        plan = make_plan(problem(m=m, h=h, i=i, dtype=dtype, path=path), H200)
    routing = empty_routing(torch.empty(m, 2, dtype=torch.int32), 8, plan.block_m)
    assert routing.sorted_routes.numel() == plan.max_rows and routing.tile_experts.numel() == plan.max_tiles
    routing_bytes = sum(x.numel() * x.element_size() for x in routing)
    assert plan.workspace_bytes == plan.max_rows * (act_bytes + row_bytes) + routing_bytes
    with dispatch.override(Override(variant="direct")):
        plan = make_plan(problem(m=m, h=h, i=i, dtype=dtype, path=path), H200)
    assert plan.max_rows == plan.max_tiles == 2 * m and plan.workspace_bytes == 2 * m * act_bytes
    assert row_stride(i) >= i and row_stride(i) * dtype.itemsize % 16 == 0


def test_one_token_needs_no_sort(monkeypatch):
    assert [make_plan(problem(m=m), H200).variant for m in (1, 2, 64)] == ["direct", "sorted", "sorted"]
    assert make_plan(problem(m=1, path="classic"), A100).variant == "direct"
    monkeypatch.setenv("MOE_OPS_BATCH_INVARIANT", "1")
    assert make_plan(problem(m=1), H200).variant == "sorted"


@pytest.mark.parametrize("device", GPUS, ids=by_name)
def test_dependent_launch_needs_compute_capability_9(device):
    assert make_plan(problem(), device).dependent_launch == (device in WITH_TMA)
    assert make_plan(problem(path="classic"), device).dependent_launch == (device in WITH_TMA)
    assert not make_plan(problem(path="classic"), INTERPRETER).dependent_launch


def test_extreme_sizes():
    nothing = make_plan(problem(m=0), H200)
    assert nothing.path == "tma" and nothing.max_tiles == nothing.max_rows == 0
    alone = make_plan(problem(m=1, e=1, top_k=1), H200)
    assert alone.max_tiles == 1 and alone.max_rows >= 1
    # As many routes as may be: row numbers still fit 32 bits.
    huge = make_plan(problem(m=1 << 27, e=8, top_k=15), H200)
    assert huge.max_rows >= 15 << 27 and huge.max_rows < 1 << 31
    assert huge.workspace_bytes > huge.max_rows * (128 + 96) * 2


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_paths_without_tiles(path):
    plan = make_plan(problem(path="auto" if path == "cpu" else path), CPU)
    assert (plan.path, plan.up, plan.down, plan.max_tiles, plan.workspace_bytes) == (path, None, None, 0, 0)


# The bound of the row blocks.


def blocks_of(counts: list[int], block: int) -> int:
    return sum(-(-count // block) for count in counts)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 256), st.integers(0, 50))
def test_row_blocks_are_never_more_than_the_bound(counts, block, dropped):
    routes = sum(counts) + dropped
    bound = max_row_blocks(routes, len(counts), block)
    assert blocks_of(counts, block) <= bound
    assert bound * block <= routes + min(routes, len(counts)) * (block - 1)


def test_row_blocks_reach_the_bound():
    for experts, block, routes in itertools.product((1, 2, 3), (1, 2, 3, 5, 16), range(9)):
        shares = (counts for counts in itertools.product(range(routes + 1), repeat=experts) if sum(counts) == routes)
        worst = max(blocks_of(counts, block) for counts in shares)
        assert worst == max_row_blocks(routes, experts, block), (experts, block, routes)


# Overrides and tile configurations.


def test_override_of_the_path():
    call = problem()
    with dispatch.override(Override(path="classic")):
        assert make_plan(call, H200).path == "classic"
        with dispatch.override(Override(path="reference")):
            assert make_plan(call, H200).path == "reference"
        assert make_plan(call, H200).path == "classic"
        with pytest.raises(RuntimeError, match="inner"), dispatch.override(Override(path="reference")):
            raise RuntimeError("inner")
        assert make_plan(call, H200).path == "classic"
    assert make_plan(call, H200).path == "tma"
    with dispatch.override(Override(path="tma")), pytest.raises(ValueError, match=r"TMA needs 9\.0"):
        make_plan(call, A100)
    with pytest.raises(ValueError, match="path is 'clasic', expected one of 'auto', 'tma', 'classic', 'reference'"):
        Override(path="clasic")
    with pytest.raises(ValueError, match="variant is 'unsorted', expected one of 'direct', 'sorted'"):
        Override(variant="unsorted")


def test_override_of_the_tiles():
    up, down = TileConfig(32, 32, 64), TileConfig(32, 64, 32)
    with dispatch.override(Override(up=up, down=down)):
        plan = make_plan(problem(m=1000), H200)
        assert (plan.path, plan.up, plan.down, plan.block_m) == ("tma", up, down, 32)
        assert plan.max_tiles == max_row_blocks(2000, 8, 32)
        assert make_plan(problem(), CPU).up is None
    assert make_plan(problem(m=1000), H200).up != up
    uneven, words = (
        Override(up=up, down=TileConfig(64, 64, 32)),
        r"up\.block_m is 32 and down\.block_m 64; both must be",
    )
    with dispatch.override(uneven), pytest.raises(ValueError, match=words):
        make_plan(problem(), H200)


@pytest.mark.parametrize(
    ("variant", "block_m", "block_n", "words"),
    [
        ("direct", 16, 16, "block_m is 16 in variant 'direct'; it is 1 in 'direct', and in no other"),
        ("sorted", 1, 16, "block_m is 1 in variant 'sorted'; it is 1 in 'direct', and in no other"),
        ("sorted", 16, 8, "is below 16, which only variants 'direct' and 'packed' can have"),
        ("pingpong", 64, 64, "up is .*, and variant 'pingpong' has .*; only group_m and num_stages may differ"),
    ],
)
def test_override_of_the_tiles_fits_the_variant(variant, block_m, block_n, words):
    tile = TileConfig(block_m, block_n, 64)
    with dispatch.override(Override(variant=variant, up=tile, down=tile)), pytest.raises(ValueError, match=words):
        make_plan(problem(), H200)
