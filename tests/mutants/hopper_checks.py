"""What a mutated copy of the package's kernels in Gluon has to fail: on a GPU, or emulated where Triton interprets.

On a GPU there are more tiles than its programs hold at once, and every call runs several times over; emulated there are
two programs, and the runs differ by the order in which things happen.
"""

import contextlib
import os
from functools import partial

import torch
from torch.nn import functional

from moe_ops.arguments import Arguments
from moe_ops.testing import assert_correct, emulate, override, poisoned_memory
from moe_ops.testing.hopper import hopper
from moe_ops.tuning import TileConfig
from tests.cases import option_case, run
from tests.padding import assert_padding_left, padded_case
from tests.quantized import check_every_scale, every_scale_case, fine_scales_case, quantized_case, scales_of_zero_case

EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if EMULATED else "cuda"
RUNS = 2 if EMULATED else 6


def machine(seed: int = 0) -> contextlib.AbstractContextManager:
    """Where the kernels run."""
    return hopper(seed=seed) if EMULATED else contextlib.nullcontext()


def over_and_over(args: Arguments, **forced) -> None:
    """A call on the TMA path as it is forced: right, and again and again the same."""
    with override(path="tma", **forced), poisoned_memory():
        with machine():
            out = run(args)
        assert_correct(out, args)
        for seed in range(1, RUNS):
            with machine(seed):
                assert torch.equal(run(args), out)


def pingpong(name: str, **sizes) -> None:
    """An option through the ping-pong kernel."""
    sizes = {"num_tokens": 100 if EMULATED else 700, "hidden": 264, "intermediate": 136} | sizes
    args = option_case(name, torch.bfloat16, DEVICE, **sizes)
    # NaN behind every token, in rows that are still multiples of 16 bytes.
    args.hidden_states = functional.pad(args.hidden_states, (0, 24), value=float("nan"))[:, :-24]
    over_and_over(args, variant="pingpong")


def pingpong_channels() -> None:
    """A scale and a bias for each row of weights, and tiles of several experts a consumer."""
    sizes = {"num_tokens": several(), "hidden": 288, "intermediate": 160, "bias": True}
    over_and_over(quantized_case("fp8_channel", torch.bfloat16, DEVICE, **sizes), variant="pingpong")


def pingpong_padding() -> None:
    """Rows that nobody reads."""
    with machine():
        assert_padding_left(padded_case(None, DEVICE), path="tma", variant="pingpong")


def pingpong_scales_of_zero() -> None:
    """Scales of 0 that are given."""
    over_and_over(scales_of_zero_case(DEVICE), variant="pingpong")


def blockscaled(name: str, **sizes) -> None:
    """A format of blocks through the block-scaled kernel."""
    sizes = {"num_tokens": 100 if EMULATED else 700, "hidden": 288, "intermediate": 160} | sizes
    over_and_over(quantized_case(name, torch.bfloat16, DEVICE, **sizes), variant="blockscaled")


def packed(name: str, splits: int = 1, **sizes) -> None:
    """A format of 4 bits through the kernels for few rows."""
    sizes = {"num_tokens": 20 if EMULATED else 40, "hidden": 288, "intermediate": 160, "bias": True} | sizes
    over_and_over(quantized_case(name, torch.bfloat16, DEVICE, **sizes), variant="packed", splits=splits)


def packed_many_tiles() -> None:
    """More row blocks than the launches have programs for."""
    sizes = {"experts": 8, "hidden": 512} if EMULATED else {"experts": 64, "hidden": 4096, "intermediate": 1024}
    packed("int4", num_tokens=24, top_k=4, **sizes)


def mixed(name: str, **sizes) -> None:
    """A format of weights beside 16-bit rows."""
    sizes = {"num_tokens": 60 if EMULATED else 700, "hidden": 288, "intermediate": 160, "bias": True} | sizes
    over_and_over(quantized_case(name, torch.bfloat16, DEVICE, **sizes), variant="mixed")


def mixed_full_blocks() -> None:
    """Row blocks of 128 with one row less, with half of them, and with one row."""
    args = quantized_case("int8_weights", torch.bfloat16, DEVICE, num_tokens=192, experts=3, top_k=1)
    token = torch.arange(192, device=DEVICE, dtype=torch.int32)[:, None]
    args.topk_ids = torch.bucketize(token, token.new_tensor([127, 191]), right=True, out_int32=True)
    config = tuple(TileConfig(128, columns, 64, 8, 4, 4, True) for columns in (64, 128))
    over_and_over(args, variant="mixed", config=config)


def mixed_fine_scales() -> None:
    """Scales that bfloat16 does not hold, exactly."""
    args = fine_scales_case(DEVICE, 16)
    with machine(), override(path="tma", variant="mixed"):
        assert torch.equal(run(args), emulate(args))


def mixed_infinite() -> None:
    """Infinite rows, and columns of act that do not exist."""
    args = quantized_case("int4", torch.bfloat16, DEVICE, num_tokens=4, intermediate=160)
    args.w1, args.w2 = torch.full_like(args.w1, 0x99), torch.full_like(args.w2, 0x99)
    args.hidden_states[:] = torch.inf
    with machine(), override(path="tma", variant="mixed"):
        assert (run(args) == torch.inf).all()


def every_scale(variant: str) -> None:
    """All scales of mxfp4, exactly."""
    with machine():
        check_every_scale(*every_scale_case(DEVICE, 8), variant)


def several() -> int:
    """So many tokens that every consumer has several tiles."""
    return 100 if EMULATED else 20000


def many(num_tokens: int) -> int:
    """So many tokens on a GPU; emulated it is the K steps that are many."""
    return num_tokens // 50 if EMULATED else num_tokens


# By kernel: the checks that its mutants have to fail one of.
KINDS = (
    {
        "pingpong plain": partial(pingpong, "plain"),
        "pingpong biases_interleaved": partial(pingpong, "biases_interleaved"),
        "pingpong n_major": partial(pingpong, "n_major"),
        "pingpong last columns": partial(pingpong, "plain", num_tokens=several(), hidden=272, intermediate=144),
        "pingpong scales of zero": pingpong_scales_of_zero,
        "pingpong padding": pingpong_padding,
        "pingpong fp8_channel": pingpong_channels,
        "pingpong many K steps": partial(pingpong, "plain", num_tokens=many(3000), hidden=1032, intermediate=1096),
    },
    {
        "blockscaled fp8_block": partial(blockscaled, "fp8_block"),
        "blockscaled fp8_block_given": partial(blockscaled, "fp8_block_given", routing="zipf"),
        "blockscaled many K steps": partial(
            blockscaled, "fp8_block", num_tokens=many(3000), hidden=1040, intermediate=1104
        ),
    },
    {
        "packed int4": partial(packed, "int4"),
        "packed int4_zero_points": partial(packed, "int4_zero_points"),
        "packed mxfp4": partial(packed, "mxfp4"),
        "packed every scale": partial(every_scale, "packed"),
        "packed many tiles": packed_many_tiles,
        "packed in parts": partial(packed, "int4", splits=2, num_tokens=3, intermediate=1184),
        "packed many K steps": partial(
            packed, "mxfp4", num_tokens=many(300), hidden=2048, intermediate=160 if EMULATED else 1184
        ),
    },
    {
        "mixed int8": partial(mixed, "int8_weights"),
        "mixed interleaved": partial(mixed, "int8_weights", gate_up_layout="interleaved"),
        "mixed int4_zero_points": partial(mixed, "int4_zero_points"),
        "mixed mxfp4": partial(mixed, "mxfp4"),
        "mixed every scale": partial(every_scale, "mixed"),
        "mixed full blocks": mixed_full_blocks,
        "mixed fine scales": mixed_fine_scales,
        "mixed infinite": mixed_infinite,
        "mixed many K steps": partial(mixed, "int8_weights", num_tokens=many(3000), hidden=1040, intermediate=1104),
    },
)
