"""What a call has to do at least, and how long that takes at the ceilings: FLOPs by cuBLAS, bytes by a stream."""

from dataclasses import dataclass

from moe_ops.arguments import Arguments


@dataclass(frozen=True)
class Rates:
    """The ceilings of a cell's rounds.

    Attributes:
        teraflops: TFLOP/s of the cuBLAS product.
        gigabytes: GB/s of the read-only stream.
    """

    teraflops: float
    gigabytes: float

    def limit(self, flops: float, nbytes: float) -> tuple[float, str]:
        """(milliseconds, "flops" or "bytes"): the least time, and what decides it."""
        return max((flops / self.teraflops / 1e9, "flops"), (nbytes / self.gigabytes / 1e6, "bytes"))


@dataclass(frozen=True)
class Work:
    """The least work of a call.

    Attributes:
        counts: routes of each expert that has any.
        up_flops: of one route's up projection.
        down_flops: of one route's down projection.
        up_weight_bytes: of the experts met.
        down_weight_bytes: of the experts met.
        token_bytes: of hidden_states, and of the result.
        act_bytes: of the activations between the GEMMs.
        rows_bytes: of every route's down output.
    """

    counts: tuple[int, ...]
    up_flops: int
    down_flops: int
    up_weight_bytes: int
    down_weight_bytes: int
    token_bytes: int
    act_bytes: int
    rows_bytes: int

    @property
    def experts_met(self) -> int:
        """Experts with a route."""
        return len(self.counts)

    @property
    def routes(self) -> int:
        """M * top_k."""
        return sum(self.counts)

    @property
    def least_bytes(self) -> int:
        """Weights of the experts met, hidden_states and the result."""
        return self.up_weight_bytes + self.down_weight_bytes + 2 * self.token_bytes

    def padded_rows(self, block_m: int) -> int:
        """Rows the GEMMs multiply where each expert's are padded to whole blocks."""
        return sum(-(-count // block_m) * block_m for count in self.counts)

    def limit(self, rates: Rates, rows: int | None = None) -> tuple[float, str]:
        """The whole call's least time, with `rows` multiplied instead of the real ones."""
        rows = self.routes if rows is None else rows
        return rates.limit(rows * (self.up_flops + self.down_flops), self.least_bytes)


def work_of(args: Arguments) -> Work:
    """The least work of an unquantised call whose ids are all in range. Waits for the device."""
    counts = tuple(args.topk_ids.unique(return_counts=True)[1].tolist())
    routes, itemsize = args.topk_ids.numel(), args.hidden_states.element_size()
    return Work(
        counts=counts,
        up_flops=2 * args.w1[0].numel(),
        down_flops=2 * args.w2[0].numel(),
        up_weight_bytes=len(counts) * args.w1[0].nbytes,
        down_weight_bytes=len(counts) * args.w2[0].nbytes,
        token_bytes=args.hidden_states.nbytes,
        act_bytes=routes * args.w2.shape[2] * itemsize,
        rows_bytes=routes * args.w2.shape[1] * itemsize,
    )


def stage_report(work: Work, rates: Rates, milliseconds: dict[str, float], whole_ms: float | None) -> dict:
    """What each stage of a call reached.

    Args:
        work: of the call.
        rates: of the same rounds.
        milliseconds: of each stage alone. A path without a "combine" sums in "down".
        whole_ms: of the whole op.

    Returns:
        By stage "us", and for the GEMMs "tflops" (of real rows), "of_cublas", "of_limit" and "bound", for the combine
        "gbs" and "of_stream"; "op_over_stages": whole op / (up + down + combine at the stream's rate).
    """
    report = {name: {"us": ms * 1e3} for name, ms in milliseconds.items()}
    combines = "combine" in milliseconds
    result_bytes = work.rows_bytes if combines else work.token_bytes
    gemms = {
        "up": (work.up_flops, work.up_weight_bytes + work.token_bytes + work.act_bytes),
        "down": (work.down_flops, work.down_weight_bytes + work.act_bytes + result_bytes),
    }
    for name in gemms.keys() & milliseconds.keys():
        flops, nbytes = gemms[name]
        flops *= work.routes
        ms, teraflops = milliseconds[name], flops / milliseconds[name] / 1e9
        limit, bound = rates.limit(flops, nbytes)
        report[name] |= {
            "tflops": teraflops, "of_cublas": teraflops / rates.teraflops, "of_limit": limit / ms, "bound": bound,
        }  # fmt: skip
    combine_bytes = work.rows_bytes + work.token_bytes if combines else 0
    if combines:
        gigabytes = combine_bytes / milliseconds["combine"] / 1e6
        report["combine"] |= {"gbs": gigabytes, "of_stream": gigabytes / rates.gigabytes}
    if whole_ms is not None and gemms.keys() <= milliseconds.keys():
        least = milliseconds["up"] + milliseconds["down"] + combine_bytes / rates.gigabytes / 1e6
        report["op_over_stages"] = whole_ms / least
    return report
