"""What expert parallelism sends, and how long that takes: pure functions of sizes and of a network."""

from dataclasses import dataclass
from typing import Any

from moe_ops.checks import require_name

WAYS = ("gather", "alltoall")
# Collectives of each way: one out and one back, and with uneven splits one that announces them.
_COLLECTIVES = 2
# Bytes of own memory that go by for an element that travels in 16 bits: read in 32 and written, read again for the sum.
_ROUNDED = 8


@dataclass(frozen=True)
class Network:
    """How fast the ranks reach each other; every rank sends and receives at once.

    The defaults are what was measured between two H100s of one host (docs/distributed.md), and 400 Gbit/s for each GPU
    between hosts.

    Attributes:
        bandwidth: bytes per second that a rank sends to ranks of its node, all together.
        latency: seconds a collective takes, however little it sends.
        handling: seconds that an all-to-all takes beside its collectives and more than a gather does: rows to find
            and to sum.
        host_sync: seconds that reading sizes back to the host costs, the launches after it included.
        rounding: seconds that partial sums in 16 bits take more than those in 32, beside the bytes: launches.
        memory: bytes per second of a rank's own memory, which rounding partial sums reads and writes.
        node_size: ranks of a node; None: all are of one.
        node_bandwidth: bytes per second that a rank sends to other nodes.
    """

    bandwidth: float = 240e9
    latency: float = 15e-6
    handling: float = 20e-6
    host_sync: float = 300e-6
    rounding: float = 5e-6
    memory: float = 2.5e12
    node_size: int | None = None
    node_bandwidth: float = 50e9

    def __post_init__(self) -> None:
        for name in ("bandwidth", "node_bandwidth", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected bytes per second, above 0")
        for name in ("latency", "handling", "host_sync", "rounding"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected seconds, at least 0")
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"node_size is {self.node_size}, expected at least 1 rank, or None")

    def seconds(self, nbytes: float, num_ranks: int) -> float:
        """What it takes a rank to send so many bytes in all, as many to every other rank."""
        if num_ranks == 1:
            return 0.0
        inside = min(self.node_size or num_ranks, num_ranks) - 1
        near = nbytes * inside / (num_ranks - 1)
        return max(near / self.bandwidth, (nbytes - near) / self.node_bandwidth)


@dataclass(frozen=True)
class Traffic:
    """What one layer sends from one rank.

    Attributes:
        way: "gather" or "alltoall".
        rows: that leave the rank on the way out, and as many come back.
        out_bytes: of those rows.
        back_bytes: of the partial sums.
        seconds: of the collectives, one after the other, and of a host sync where there is one.
    """

    way: str
    rows: float
    out_bytes: float
    back_bytes: float
    seconds: float


def expected_share(top_k: int, num_ranks: int) -> float:
    """Share of the tokens that have an expert on a given rank, if experts are drawn at random: 1 - (1 - 1 / W)^top_k.

    Args:
        top_k: experts of a token.
        num_ranks: W.

    Returns:
        A number in 0 .. 1.

    Example:
        >>> from moe_ops.distributed import expected_share
        >>> [round(expected_share(8, ranks), 3) for ranks in (2, 8, 64)]
        [0.996, 0.656, 0.118]
    """
    return 1 - (1 - 1 / num_ranks) ** top_k


def estimate(
    way: str,
    num_tokens: int,
    *,
    hidden_size: int,
    top_k: int,
    num_ranks: int,
    row_bytes: int,
    back_bytes: int,
    capacity: int | None = None,
    host_sync: bool = False,
    network: Network = Network(),
) -> Traffic:
    """What a layer sends from each rank, and how long it takes.

        gather:    (W - 1) * M rows out, and as many partial sums in the reduce-scatter back
        alltoall:  (W - 1) * M * (1 - (1 - 1 / W)^top_k) rows out and back; with a capacity C, (W - 1) * C
        seconds = latency * collectives + bytes / bandwidth (+ handling of the all-to-all) (+ host_sync)

    Args:
        way: "gather" or "alltoall".
        num_tokens: M of every rank.
        hidden_size: H.
        top_k: experts of a token.
        num_ranks: W.
        row_bytes: of a row on the way out.
        back_bytes: of an element on the way back.
        capacity: rows of each pair of ranks in an all-to-all of equal splits; None: as many as there are.
        host_sync: sizes are read back to the host.
        network: how fast the ranks reach each other.

    Returns:
        The estimate.

    Raises:
        ValueError: `way` is none of the two.

    Example:
        >>> from moe_ops.distributed import estimate
        >>> sizes = {"hidden_size": 7168, "top_k": 8, "num_ranks": 64, "row_bytes": 7552, "back_bytes": 2}
        >>> [round(estimate(way, 128, **sizes).rows) for way in ("gather", "alltoall")]
        [8064, 955]
    """
    require_name("way", way, WAYS)
    rows = float((num_ranks - 1) * num_tokens)
    if way == "alltoall":
        rows = float((num_ranks - 1) * capacity) if capacity is not None else rows * expected_share(top_k, num_ranks)
    out, back = rows * row_bytes, rows * hidden_size * back_bytes
    collectives = _COLLECTIVES + (1 if host_sync else 0)
    seconds = network.latency * collectives + (network.host_sync if host_sync else 0.0)
    seconds += network.handling if way == "alltoall" else 0.0
    seconds += network.seconds(out, num_ranks) + network.seconds(back, num_ranks)
    return Traffic(way, rows, out, back, seconds)


def halving_pays(num_tokens: int, *, hidden_size: int, num_ranks: int, network: Network = Network()) -> bool:
    """Whether partial sums come back sooner in 16 bits than in 32: fewer bytes travel, and they are rounded before.

        2 * elements / bandwidth  >  rounding + 8 * elements / memory,   elements = (W - 1) * M * H

    Args:
        num_tokens: M, the largest of the ranks.
        hidden_size: H.
        num_ranks: W.
        network: how fast the ranks reach each other.

    Returns:
        Whether they do.

    Example:
        >>> from moe_ops.distributed.cost import halving_pays
        >>> [halving_pays(tokens, hidden_size=2048, num_ranks=2) for tokens in (64, 4096)]
        [False, True]
    """
    elements = (num_ranks - 1) * num_tokens * hidden_size
    return network.seconds(2 * elements, num_ranks) > network.rounding + _ROUNDED * elements / network.memory


def choose_way(
    num_tokens: int, *, capacity: int | None = None, host_sync: bool = False, **sizes: Any
) -> tuple[Traffic, Traffic]:
    """The faster way for so many tokens on every rank, and the other one.

    Args:
        num_tokens: M, the largest of the ranks.
        capacity: of the all-to-all, as `estimate`.
        host_sync: of the all-to-all, as `estimate`.
        **sizes: as `estimate`.

    Returns:
        (the faster, the other); equal ones in the order "gather", "alltoall".

    Example:
        >>> from moe_ops.distributed import choose_way
        >>> sizes = {"hidden_size": 7168, "top_k": 8, "num_ranks": 8, "row_bytes": 7552, "back_bytes": 4}
        >>> [choose_way(tokens, host_sync=True, **sizes)[0].way for tokens in (16, 4096)]
        ['gather', 'alltoall']
    """
    gather = estimate("gather", num_tokens, **sizes)
    alltoall = estimate("alltoall", num_tokens, capacity=capacity, host_sync=host_sync, **sizes)
    return (alltoall, gather) if alltoall.seconds < gather.seconds else (gather, alltoall)
