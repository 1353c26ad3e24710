"""What a tile configuration may be."""

import pytest

from moe_ops.tuning import TileConfig


@pytest.mark.parametrize("field", ["block_m", "block_n", "block_k"])
@pytest.mark.parametrize("value", [0, 48, 4096, -16])
def test_tile_blocks(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}, expected a power of two up to \\d+$"):
        TileConfig(**{"block_m": 64, "block_n": 64, "block_k": 64, field: value})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_warps", 3, "1, 2, 4, 8 or 16"),
        ("num_warps", 32, "1, 2, 4, 8 or 16"),
        ("num_stages", 0, "1 to 8"),
        ("num_stages", 9, "1 to 8"),
        ("group_m", 0, "1 to 256"),
        ("group_m", 257, "1 to 256"),
    ],
)
def test_tile_options(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field} is {value}, expected {expected}$"):
        TileConfig(64, 64, 64, **{field: value})


def test_tile_shared_memory():
    config = TileConfig(64, 128, 32, num_stages=3)
    assert config.shared_memory(2, gated=False) == 3 * (64 + 128) * 32 * 2
    assert config.shared_memory(2, gated=True) == 3 * (64 + 256) * 32 * 2
