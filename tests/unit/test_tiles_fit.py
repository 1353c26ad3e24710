"""Tiles that fit a device, and what is said of those that do not."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ops.cli.formats import FORMATS
from moe_ops.cli.problems import describe_call
from moe_ops.tuning import TileConfig, tile_configs
from moe_ops.tuning.obstacles import tuned_obstacle
from moe_ops.tuning.variants import choose_variant, variant_obstacle
from tests.tables import BF16, FP16, call
from tests.unit.test_dispatch import A100, GPUS, H200, RTX_4090, by_name

DRAWN_SIZES = st.tuples(
    st.sampled_from([1, 2, 8, 60, 128, 512]), st.sampled_from([1, 2, 6, 8]), st.sampled_from([128, 768, 2880, 7168]),
    st.sampled_from([64, 128, 256, 512, 768, 2048, 2880, 14336]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GPUS), st.sampled_from([BF16, FP16]), st.sampled_from([None, *FORMATS]), DRAWN_SIZES,
    st.integers(1, 1 << 17), st.sampled_from(["tma", "classic"]),
)  # fmt: skip
def test_the_heuristic_fits_every_device(device, dtype, form, sizes, tokens, path):
    drawn = describe_call(sizes, tokens, dtype, form and FORMATS[form])
    variant = choose_variant(drawn, device, path, batch_invariant=False)
    if variant_obstacle(variant, drawn, device, path) is None:
        up, down = tile_configs(drawn, device, path, variant, batch_invariant=False)
        assert tuned_obstacle(drawn, device, path, variant, up, down) is None


BASE = TileConfig(64, 64, 64, 8, 4, 3)


@pytest.mark.parametrize(
    ("device", "variant", "up", "down", "words"),
    [
        (RTX_4090, "sorted", replace(BASE, num_stages=8), BASE, "up takes 196608 bytes of shared memory, and RTX 4090"),
        (H200, "sorted", BASE, replace(BASE, block_m=128), "both must be the same"),
        (H200, "sorted", replace(BASE, block_n=256), BASE, "up has 32768 values for 4 warps, which hold 16384"),
        (
            H200,
            "sorted",
            BASE,
            replace(BASE, block_m=64, block_k=512, num_stages=1, block_n=32),
            "TMA box of 32 by 512",
        ),
        (H200, "pingpong", BASE, BASE, "only group_m and num_stages may differ"),
        (A100, "pingpong", BASE, BASE, "it needs the TMA path"),
        (H200, "direct", TileConfig(1, 64, 1024), TileConfig(1, 2, 128), "up has 131072 values"),
    ],
    ids=["shared", "block_m", "registers", "box", "form", "path", "direct"],
)
def test_what_does_not_fit(device, variant, up, down, words):
    path = "tma" if device == H200 else "classic"
    assert words in (tuned_obstacle(call(64), device, path, variant, up, down) or "")


@pytest.mark.parametrize("device", [H200, A100], ids=by_name)
def test_what_fits(device):
    assert tuned_obstacle(call(64), device, "classic", "sorted", BASE, BASE) is None
