"""Tile configurations of the two GEMMs."""

from dataclasses import dataclass

# Bytes that a multiprocessor has, and that such a program takes beside its stages.
_HOPPER_SHARED_MEMORY, _PACKED_RESERVE = 227 * 1024, 2048


@dataclass(frozen=True)
class TileConfig:
    """Tile of one grouped GEMM.

    Attributes:
        block_m: rows (routes of one expert) of a tile, the same for both GEMMs, since it is the padding of the
            sorted order. 1 where each route is multiplied by itself (variant "direct"), 8 in variant "packed" alone;
            all blocks else are 16 or more.
        block_n: output columns of a tile. A gated up projection computes gate and up of each, 2 * block_n rows of w1.
        block_k: step along the reduction.
        group_m: row blocks that sweep the columns together, so that they share a weight tile in L2.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        swap_ab: multiply weights @ rows^T instead of rows @ weights^T, for few rows.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    swap_ab: bool = False

    def __post_init__(self) -> None:
        for name, highest in (("block_m", 256), ("block_n", 256), ("block_k", 2048)):
            value = getattr(self, name)
            if not 1 <= value <= highest or value & (value - 1):
                raise ValueError(f"{name} is {value}, expected a power of two up to {highest}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}, expected 1, 2, 4, 8 or 16")
        for name, highest in (("num_stages", 8), ("group_m", 256)):
            value = getattr(self, name)
            if not 1 <= value <= highest:
                raise ValueError(f"{name} is {value}, expected 1 to {highest}")

    def packed_programs(self) -> int:
        """Programs of variant "packed" that a multiprocessor of Hopper runs at once, by shared memory and registers."""
        stage_bytes = self.block_k // 2 * 64 + 2 * self.block_k * self.block_m
        most = 4 if self.block_m <= 16 else 3
        return min(most, _HOPPER_SHARED_MEMORY // (self.num_stages * stage_bytes + _PACKED_RESERVE))

    def shared_memory(self, itemsize: int, *, gated: bool) -> int:
        """Bytes of shared memory the pipeline's stages take; the epilogue reuses them."""
        columns = self.block_n * (2 if gated else 1)
        return self.num_stages * (self.block_m + columns) * self.block_k * itemsize
