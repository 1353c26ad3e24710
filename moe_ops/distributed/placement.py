"""Which rank has which experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Placement:
    """Which rank has which experts; every expert is on one rank, and a rank may have none.

    Rank r's weights hold its experts in the order of `experts[r]`.

    Args:
        experts: the experts of each rank, by their global numbers.

    Attributes:
        experts: the experts of each rank.
        rank_of: each expert's rank.
        local_of: each expert's number on its rank.

    Raises:
        ValueError: an expert is missing, or there twice, or the numbers have gaps.

    Example:
        >>> from moe_ops.distributed import Placement
        >>> Placement.even(5, 2).experts
        ((0, 1, 2), (3, 4))
        >>> Placement(((4, 0), (1, 2, 3))).local_of
        (1, 0, 1, 2, 0)
    """

    experts: tuple[tuple[int, ...], ...]
    rank_of: tuple[int, ...] = field(init=False, repr=False, compare=False)
    local_of: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        experts = tuple(tuple(int(expert) for expert in mine) for mine in self.experts)
        if not experts:
            raise ValueError("experts is empty, expected the experts of each rank")
        found = sorted(expert for mine in experts for expert in mine)
        if not found or found != list(range(len(found))):
            twice = sorted({expert for expert in found if found.count(expert) > 1})
            missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
            raise ValueError(
                f"experts has {len(found)} experts, twice {twice[:8]}, missing {missing[:8]}, below 0 "
                f"{[expert for expert in found if expert < 0][:8]}; expected each of 0 .. E - 1 once, on one rank"
            )
        rank_of, local_of = [0] * len(found), [0] * len(found)
        for rank, mine in enumerate(experts):
            for local, expert in enumerate(mine):
                rank_of[expert], local_of[expert] = rank, local
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "rank_of", tuple(rank_of))
        object.__setattr__(self, "local_of", tuple(local_of))

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        """E, of all ranks."""
        return len(self.rank_of)

    @classmethod
    def even(cls, num_experts: int, num_ranks: int) -> "Placement":
        """Consecutive experts, as evenly as they go: the first E % W ranks have one more.

        Args:
            num_experts: E.
            num_ranks: W.

        Returns:
            The placement.

        Raises:
            ValueError: a number below 1.
        """
        for name, value in (("num_experts", num_experts), ("num_ranks", num_ranks)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        share, more = divmod(num_experts, num_ranks)
        ends = [share * (rank + 1) + min(rank + 1, more) for rank in range(num_ranks)]
        return cls(tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)))

    @classmethod
    def from_expert_maps(cls, expert_maps: Sequence[Sequence[int]]) -> "Placement":
        """From the `expert_map` of each rank, as `moe_ops.fused_moe` takes it: [E], the local expert or -1.

        Args:
            expert_maps: one for each rank, in the order of the ranks.

        Returns:
            The placement.

        Raises:
            ValueError: the maps differ in length, a rank's local experts have gaps, or as `Placement`.
        """
        lengths = sorted({len(expert_map) for expert_map in expert_maps})
        if len(lengths) != 1:
            raise ValueError(f"expert_maps have lengths {lengths}, expected one: E, the same on every rank")
        experts = []
        for rank, expert_map in enumerate(expert_maps):
            local = {int(value): expert for expert, value in enumerate(expert_map) if value >= 0}
            kept = sum(1 for value in expert_map if value >= 0)
            if sorted(local) != list(range(kept)):
                raise ValueError(
                    f"expert_maps[{rank}] has local experts {sorted(local)[:8]} for {kept} experts, expected each of "
                    f"0 .. {kept - 1} once, and -1 for experts of other ranks"
                )
            experts.append(tuple(local[number] for number in range(kept)))
        return cls(tuple(experts))

    def expert_map(self, rank: int) -> tuple[int, ...]:
        """The `expert_map` of a rank for `moe_ops.fused_moe`: the local expert of each global one, -1 for others'."""
        return tuple(local if owner == rank else -1 for owner, local in zip(self.rank_of, self.local_of, strict=True))
