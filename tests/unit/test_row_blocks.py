"""The row block of the heuristic: it holds the rows of most experts, and not many more."""

import math

import pytest
import torch

from moe_ops.cli.known import known_card
from moe_ops.cli.problems import describe_call
from moe_ops.tuning import tile_configs
from moe_ops.tuning.lookup import heuristic_tiles

H100 = known_card("h100").device


@pytest.mark.parametrize(
    ("sizes", "tokens", "block_m"),
    [
        ((128, 8, 2048, 768), 64, 16),  # 4 rows an expert
        ((128, 8, 2048, 768), 256, 32),  # 16
        ((128, 8, 2048, 768), 512, 64),  # 32
        ((160, 8, 5120, 192), 1024, 64),  # 51
        ((40, 8, 1536, 512), 256, 64),  # 51
        ((128, 8, 2048, 768), 960, 64),  # 60
        ((128, 8, 2048, 768), 1024, 128),  # 64, of which half of the experts have more
    ],
)
def test_block_of_rows(sizes, tokens, block_m):
    problem = describe_call(sizes, tokens, torch.bfloat16)
    tiles = heuristic_tiles(problem, H100, "tma")
    assert tiles.variant == "sorted" and tiles.up.block_m == tiles.down.block_m == block_m


@pytest.mark.parametrize("tokens", [7, 50, 300, 480])
def test_a_block_holds_most_experts(tokens):
    """A block of 64 or fewer leaves at most a third of the experts with a second one, were tokens thrown by chance."""
    experts, top_k = 64, 8
    tiles = heuristic_tiles(describe_call((experts, top_k, 2048, 1024), tokens, torch.bfloat16), H100, "tma")
    if tiles.variant == "sorted" and tiles.up.block_m <= 64:
        share = top_k / experts
        more = sum(
            math.comb(tokens, n) * share**n * (1 - share) ** (tokens - n)
            for n in range(tiles.up.block_m + 1, tokens + 1)
        )
        assert more <= 1 / 3


def test_batch_invariant_tiles_do_not_see_the_rows():
    problems = [describe_call((128, 8, 2048, 768), tokens, torch.bfloat16) for tokens in (1, 256, 960, 4096)]
    assert len({tile_configs(problem, H100, "tma", batch_invariant=True) for problem in problems}) == 1
