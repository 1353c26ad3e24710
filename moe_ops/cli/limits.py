"""What a call has to do at least, and how long that takes at the ceilings: FLOPs by cuBLAS, bytes by a stream."""

from dataclasses import dataclass

from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.problem import Problem
from moe_ops.quantization.scheme import GROUP, make_scheme


@dataclass(frozen=True)
class Rates:
    """The ceilings of a cell's rounds.

    Attributes:
        teraflops: TFLOP/s of the cuBLAS product.
        gigabytes: GB/s of the read-only stream.
        scaled_teraflops: TFLOP/s of the product in fp8, for a call that multiplies in fp8 or int8; None for others.
    """

    teraflops: float
    gigabytes: float
    scaled_teraflops: float | None = None

    def limit(self, flops: float, nbytes: float) -> tuple[float, str]:
        """(milliseconds, "flops" or "bytes"): the least time, and what decides it."""
        teraflops = self.scaled_teraflops or self.teraflops
        return max((flops / teraflops / 1e9, "flops"), (nbytes / self.gigabytes / 1e6, "bytes"))


@dataclass(frozen=True)
class Work:
    """The least work of a call.

    Attributes:
        counts: routes of each expert that has any.
        up_flops: of one route's up projection.
        down_flops: of one route's down projection.
        up_weight_bytes: of the experts met, scales included.
        down_weight_bytes: of the experts met, scales included.
        token_bytes: of hidden_states, and of the result.
        act_bytes: of the activations between the GEMMs.
        rows_bytes: of every route's down output.
        quantized_token_bytes: of the quantised hidden states and their scales; 0 in a call that quantises none.
        quantized_act_bytes: likewise of the activations.
    """

    counts: tuple[int, ...]
    up_flops: int
    down_flops: int
    up_weight_bytes: int
    down_weight_bytes: int
    token_bytes: int
    act_bytes: int
    rows_bytes: int
    quantized_token_bytes: int = 0
    quantized_act_bytes: int = 0

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
    """The least work of a call of 16-bit hidden states whose ids are all in range. Waits for the device."""
    counts = tuple(args.topk_ids.unique(return_counts=True)[1].tolist())
    (num_tokens, hidden), itemsize = args.hidden_states.shape, args.hidden_states.element_size()
    routes, scheme = args.topk_ids.numel(), make_scheme(args)
    intermediate = scheme.columns(args.w2.shape[2])
    return Work(
        counts=counts,
        up_flops=2 * args.w1.shape[1] * hidden,
        down_flops=2 * hidden * intermediate,
        up_weight_bytes=len(counts) * _expert_bytes(args.w1, args.w1_scale),
        down_weight_bytes=len(counts) * _expert_bytes(args.w2, args.w2_scale),
        token_bytes=args.hidden_states.nbytes,
        act_bytes=routes * intermediate * itemsize,
        rows_bytes=routes * hidden * itemsize,
        quantized_token_bytes=_quantized_bytes(num_tokens, hidden, scheme.inputs),
        quantized_act_bytes=_quantized_bytes(routes, intermediate, scheme.act),
    )


def _expert_bytes(weight: Tensor, scale: Tensor | None) -> int:
    return weight[0].nbytes + (0 if scale is None else scale[0].nbytes)


def _quantized_bytes(rows: int, columns: int, granularity: str) -> int:
    """Of rows of a byte an element, with the float32 scales that the op makes."""
    if not granularity:
        return 0
    scales = {"token": 1, "group": -(-columns // GROUP)}.get(granularity, 0)
    return rows * (columns + 4 * scales)


def stage_report(work: Work, rates: Rates, milliseconds: dict[str, float], whole_ms: float | None) -> dict:
    """What each stage of a call reached.

    Args:
        work: of the call.
        rates: of the same rounds.
        milliseconds: of each stage alone. A path without a "combine" sums in "down", and one without a "quantize"
            multiplies rows as they are, and keeps the activation so.
        whole_ms: of the whole op.

    Returns:
        By stage "us", and for the GEMMs "tflops" (of real rows), "of_cublas" (with a rate in fp8 "of_scaled_mm"),
        "of_limit" and "bound", for the others that stream "gbs" and "of_stream"; "op_over_stages": whole op / (up +
        down + quantize and combine at the stream's rate).
    """
    report = {name: {"us": ms * 1e3} for name, ms in milliseconds.items()}
    combines, quantizes = "combine" in milliseconds, "quantize" in milliseconds
    result_bytes = work.rows_bytes if combines else work.token_bytes
    input_bytes = work.quantized_token_bytes if quantizes else work.token_bytes
    act_bytes = work.quantized_act_bytes if quantizes else work.act_bytes
    gemms = {
        "up": (work.up_flops, work.up_weight_bytes + input_bytes + act_bytes),
        "down": (work.down_flops, work.down_weight_bytes + act_bytes + result_bytes),
    }
    for name in gemms.keys() & milliseconds.keys():
        flops, nbytes = gemms[name]
        flops *= work.routes
        ms, teraflops = milliseconds[name], flops / milliseconds[name] / 1e9
        limit, bound = rates.limit(flops, nbytes)
        report[name] |= {
            "tflops": teraflops, "of_cublas": teraflops / rates.teraflops, "of_limit": limit / ms, "bound": bound,
        }  # fmt: skip
        if rates.scaled_teraflops:
            report[name]["of_scaled_mm"] = teraflops / rates.scaled_teraflops
    streams = {"quantize": work.token_bytes + work.quantized_token_bytes, "combine": work.rows_bytes + work.token_bytes}
    streams = {name: nbytes for name, nbytes in streams.items() if name in milliseconds}
    for name, nbytes in streams.items():
        gigabytes = nbytes / milliseconds[name] / 1e6
        report[name] |= {"gbs": gigabytes, "of_stream": gigabytes / rates.gigabytes}
    if whole_ms is not None and gemms.keys() <= milliseconds.keys():
        least = milliseconds["up"] + milliseconds["down"] + sum(streams.values()) / rates.gigabytes / 1e6
        report["op_over_stages"] = whole_ms / least
    return report


def expected_work(problem: Problem) -> Work:
    """The least work of a call whose tokens choose experts evenly: as many experts as can be expected, equal shares."""
    experts, routes, itemsize = problem.num_experts, problem.num_routes, problem.dtype.itemsize
    top_k, scheme = min(problem.top_k, experts), problem.scheme
    met = round(experts * (1 - (1 - top_k / experts) ** problem.num_tokens))
    met = max(1, min(met, routes)) if routes else 0
    hidden, intermediate = problem.hidden_size, problem.intermediate_size

    def expert_bytes(rows: int, columns: int) -> int:
        weights = rows * columns * problem.weight_dtype.itemsize // scheme.planes
        if not scheme.quantized:
            return weights
        groups = (-(-rows // scheme.scale_rows) if scheme.scale_rows else 1) * (
            -(-columns // scheme.scale_columns) if scheme.scale_columns else 1
        )
        return weights + groups * (1 if scheme.name == "mxfp4_w4a16" else 4)

    return Work(
        counts=tuple(routes // met + (1 if number < routes % met else 0) for number in range(met)),
        up_flops=2 * problem.w1_rows * hidden,
        down_flops=2 * hidden * intermediate,
        up_weight_bytes=met * expert_bytes(problem.w1_rows, hidden),
        down_weight_bytes=met * expert_bytes(hidden, intermediate),
        token_bytes=problem.num_tokens * hidden * itemsize,
        act_bytes=routes * intermediate * itemsize,
        rows_bytes=routes * hidden * itemsize,
        quantized_token_bytes=_quantized_bytes(problem.num_tokens, hidden, scheme.inputs),
        quantized_act_bytes=_quantized_bytes(routes, intermediate, scheme.act),
    )
