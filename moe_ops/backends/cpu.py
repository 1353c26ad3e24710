"""The CPU backend: torch only. Routes sorted by expert, one pair of matrix products per expert that has any."""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.problem import Arguments, Problem
from moe_ops.quantization import dequantize_activations, quantize_activations
from moe_ops.reference import activate, expert_weight, local_experts
from moe_ops.routing import Routing, empty_routing

# Rows of experts that are taken together: enough to share the calls around the matrix products, few enough to stay
# in the cache between them. An expert with more rows is taken alone.
_CHUNK_ROWS = 256
# Where the CPU has no 16-bit matrix product, converting the weights to fp32 pays from this many rows on.
_ROWS_TO_WIDEN = 8
# Columns of the result that each thread gets at least, where a product is split by hand, and weights of an expert below
# which the calls around the product cost more than threads save.
_COLUMNS_TO_SPLIT = 64
_WEIGHTS_TO_SPLIT = 2**18


class Group(NamedTuple):
    """The sorted routes start .. stop - 1 belong to one expert."""

    expert: int
    start: int
    stop: int


def run(args: Arguments, problem: Problem, out: Tensor) -> Tensor:
    """Runs a call on the CPU.

    Args:
        args: the call.
        problem: its description.
        out: the result, of `problem.out_shape`, any strides; written.

    Returns:
        out.
    """
    experts, order, groups = _group_routes(args, problem)
    dropped = len(groups) > 0 and groups[0].expert < 0
    scheme, hidden_states = problem.scheme, _inputs(args, problem)
    weights = args.topk_weights.float().flatten().unsqueeze(1)
    if order is None:
        inputs = hidden_states.expand(problem.num_routes, -1)
    else:
        weights, tokens = weights[order], order // problem.top_k
    if scheme.quantized:
        up_product, down_product = (_DequantizedProduct(args, problem, which) for which in ("w1", "w2"))
    else:
        # The routing weight may come between the up projection and its bias.
        up_product, down_product = _GroupedProduct(args.w1), _GroupedProduct(args.w2, args.w2_bias)
    # In the order of the routes, so that the sum over k has the order of k. Routes without an expert stay 0.
    routes = (torch.zeros if dropped else torch.empty)(problem.num_routes, problem.hidden_size)
    for chunk in _chunks(groups[1:] if dropped else groups):
        rows = slice(chunk[0].start, chunk[-1].stop)
        up = up_product(inputs[rows] if order is None else hidden_states[tokens[rows]], chunk)
        if problem.router_weight_on_input or args.w1_bias is not None:
            up = up.float()
            if problem.router_weight_on_input:
                up *= weights[rows]
            if args.w1_bias is not None:
                up += args.w1_bias[experts[rows]]
        act = activate(up.float(), problem).to(problem.dtype)
        if scheme.act:
            act = _quantized(act, problem, scheme.act, _act_scale(args, problem, experts[rows]))
        down = down_product(act, chunk)
        if scheme.quantized:
            if args.w2_bias is not None:
                down += args.w2_bias[experts[rows]]
            down = down.to(problem.dtype)
        weighted = down.float() if problem.router_weight_on_input else down * weights[rows]
        routes[rows if order is None else order[rows]] = weighted
    if problem.routed_scaling_factor != 1.0:
        routes *= problem.routed_scaling_factor
    routes = routes.view(problem.num_tokens, problem.top_k, problem.hidden_size)
    return out.copy_(routes.sum(1) if problem.reduce_topk else routes)


def _inputs(args: Arguments, problem: Problem) -> Tensor:
    """The hidden states as the up projection multiplies them."""
    scheme = problem.scheme
    if scheme.inputs_given:
        return dequantize_activations(args.hidden_states, args.a1_scale)
    if scheme.inputs:
        return _quantized(args.hidden_states, problem, scheme.inputs, args.a1_scale)
    return args.hidden_states


def _act_scale(args: Arguments, problem: Problem, experts: Tensor) -> Tensor | None:
    """The given scale of the activation's rows, if there is one."""
    if problem.scheme.act == "expert":
        return args.a2_scale[experts].unsqueeze(1)
    return args.a2_scale


def _quantized(x: Tensor, problem: Problem, granularity: str, scale: Tensor | None) -> Tensor:
    """x rounded to the format of the rows, in float32."""
    q, scale = quantize_activations(x, problem.scheme.row_dtype, granularity, scale)
    return dequantize_activations(q, scale)


def _group_routes(args: Arguments, problem: Problem) -> tuple[Tensor, Tensor | None, list[Group]]:
    """The routes sorted by expert: their experts, their numbers, and who has which of them. -1 comes first.

    The routes of a single token stay as they are, without numbers, if all have an expert: there is nothing to gather.
    """
    experts = local_experts(args.topk_ids, problem.num_experts, args.expert_map).flatten()
    if problem.num_tokens == 1 and min(ids := experts.tolist()) >= 0:
        return experts, None, [Group(expert, route, route + 1) for route, expert in enumerate(ids)]
    experts, order = experts.sort(stable=True)
    present, counts = (values.tolist() for values in torch.unique_consecutive(experts, return_counts=True))
    stops = itertools.accumulate(counts)
    return experts, order, [Group(e, stop - n, stop) for e, n, stop in zip(present, counts, stops, strict=True)]


def _chunks(groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
    """Splits groups into runs of at most `_CHUNK_ROWS` rows, or of one group."""
    first = 0
    for i, group in enumerate(groups):
        if i > first and group.stop - groups[first].start > _CHUNK_ROWS:
            yield groups[first:i]
            first = i
    if groups:
        yield groups[first:]


class _GroupedProduct:
    """rows @ weights[expert]^T + bias[expert] for rows sorted by expert: the rows' dtype, fp32 inside, one rounding.

    Args:
        weights: [E, N, K], any strides.
        bias: [E, N] of the dtype of the weights or fp32, any strides; or None.
    """

    def __init__(self, weights: Tensor, bias: Tensor | None = None):
        experts, columns, depth = weights.shape
        parts = _parts(columns, depth)
        self._weights = weights.transpose(1, 2)  # [E, K, N]
        self._blocks = weights.view(experts, parts, -1, depth).transpose(2, 3)  # [E, parts, K, N / parts]
        self._wide_block = None
        self._bias = bias
        if bias is not None and bias.dtype != weights.dtype:
            # Added after a 16-bit product it would be rounded twice, and torch's product takes none of another dtype.
            self._rows_to_split = 0
        elif not _has_product(weights.dtype):
            self._rows_to_split = _ROWS_TO_WIDEN
        else:
            self._rows_to_split = 1 if parts > 1 and weights.dtype == torch.float32 else sys.maxsize

    def __call__(self, rows: Tensor, groups: Sequence[Group]) -> Tensor:
        """[n, K] -> [n, N]; `groups` cover the n rows in order."""
        out = rows.new_empty(rows.shape[0], self._weights.shape[2])
        counts = [group.stop - group.start for group in groups]
        for group, count, mine, result in zip(groups, counts, rows.split(counts), out.split(counts), strict=True):
            bias = None if self._bias is None else self._bias[group.expert]
            if count >= self._rows_to_split:
                self._split_product(mine, self._blocks[group.expert], bias, result)
            elif bias is None:
                torch.mm(mine, self._weights[group.expert], out=result)
            else:
                torch.addmm(bias, mine, self._weights[group.expert], out=result)
        return out

    def _split_product(self, rows: Tensor, blocks: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """One product as a batch of column blocks, in fp32: MKL threads over a batch better than within a product."""
        parts, _, columns = blocks.shape
        product = torch.bmm(rows.float().expand(parts, *rows.shape), self._widen(blocks))
        if bias is not None:
            product += bias.view(parts, 1, columns)
        out.view(-1, parts, columns).copy_(product.transpose(0, 1))

    def _widen(self, blocks: Tensor) -> Tensor:
        """The blocks in fp32; 16-bit ones in a buffer that the next call overwrites."""
        if blocks.dtype == torch.float32:
            return blocks
        if self._wide_block is None:
            self._wide_block = torch.empty_like(blocks, dtype=torch.float32)
        return self._wide_block.copy_(blocks)


class _DequantizedProduct:
    """rows @ weights[expert]^T in float32 for rows sorted by expert; an expert's weights are numbers while it has rows.

    Args:
        args: the call.
        problem: its description.
        which: "w1" or "w2".
    """

    def __init__(self, args: Arguments, problem: Problem, which: str):
        self._weights = functools.partial(expert_weight, args, problem, which, dtype=torch.float32)

    def __call__(self, rows: Tensor, groups: Sequence[Group]) -> Tensor:
        """[n, K] -> [n, N]; `groups` cover the n rows in order."""
        counts = [group.stop - group.start for group in groups]
        parts = rows.float().split(counts)
        return torch.cat([part @ self._weights(group.expert).T for part, group in zip(parts, groups, strict=True)])


def _parts(columns: int, depth: int) -> int:
    """Column blocks to split a product into: one per thread, or 1 where that is not possible or of no use."""
    threads = torch.get_num_threads()
    large = columns // threads >= _COLUMNS_TO_SPLIT and columns * depth >= _WEIGHTS_TO_SPLIT
    return threads if large and torch.backends.mkl.is_available() and columns % threads == 0 else 1


@functools.lru_cache(maxsize=8)
def _has_product(dtype: torch.dtype) -> bool:
    """True if matrix products of this dtype are fast on this CPU: torch falls back to plain loops elsewhere."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return getattr(torch.ops.mkldnn, name)()


def sort_routes(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    """Sorts the routes of `topk_ids` [M, top_k] by expert; see `moe_ops.route`."""
    routing = empty_routing(topk_ids, num_experts, block)
    num_routes = routing.inverse.numel()
    experts = local_experts(topk_ids, num_experts, expert_map).flatten()
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts + 1, minlength=num_experts + 1)
    order, counts = order[counts[0] :], counts[1:]
    padded = (counts + block - 1) // block * block
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(order.numel()) + shift[experts[order]]
    routing.sorted_routes.fill_(num_routes)[rows] = order.int()
    routing.inverse.fill_(-1)[order] = rows.int()
    tiles = torch.arange(num_experts).repeat_interleave(padded // block)
    routing.tile_experts.fill_(-1)[: tiles.numel()] = tiles.int()
    routing.num_padded.fill_(padded.sum())
    return routing
