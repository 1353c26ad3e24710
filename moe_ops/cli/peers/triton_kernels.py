"""OpenAI's triton_kernels, of Triton 3.5 or 3.6: gather, up GEMM and silu in one launch, down GEMM, sum.

Its router makes a bit matrix of experts by tokens; as in vLLM one kernel makes it of the ids.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_kernels import tensor as tensors
from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, GatherIndx, RoutingData, ScatterIndx, matmul_ogs

from moe_ops.arguments import Arguments
from moe_ops.cli.peers.weights import interleave_gate_up

_WORD = 32

# Triton 3.6's has sparse matrices in place of the module `routing`.
_LEGACY = not hasattr(tensors, "SparseMatrix")


@triton.jit
def silu_gate(x):
    """[M, 2 * N] of interleaved gates and ups -> silu(gate) * up, [M, N]. Its own swiglu adds 1 to up."""
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def pack_kernel(ids_ptr, bits_ptr, num_words, TOP_K: tl.constexpr, WORDS: tl.constexpr):
    """bits[m, e // 32] has bit e % 32 set for each expert e of token m: ids [M, TOP_K] -> bits [M, num_words]."""
    token = tl.program_id(0)
    words = tl.arange(0, WORDS)
    bits = tl.zeros((WORDS,), tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + k).to(tl.int32)
        bits |= tl.where(words == expert // 32, 1 << (expert % 32), 0)
    tl.store(bits_ptr + token * num_words + words, bits, mask=words < num_words)


def prepare(args: Arguments) -> Callable[[], Tensor]:
    """Readies weights with K contiguous, and ids and router weights in the dtypes of its own router."""
    w1, w2 = interleave_gate_up(args.w1).transpose(1, 2), args.w2.transpose(1, 2)
    x, ids, scores = args.hidden_states, args.topk_ids.to(torch.int16), args.topk_weights.to(torch.bfloat16)
    if _LEGACY:
        activation = FusedActivation(FnSpecs("silu_gate", silu_gate, ()), (), 2)
    else:
        activation = FusedActivation(FnSpecs("silu_gate", silu_gate, (), reduction_n=2), ())

    def call() -> Tensor:
        routing, gather, scatter = _route(ids, scores, args.w1.shape[0])
        act = matmul_ogs(x, w1, None, routing, gather_indx=gather, fused_activation=activation)
        act = act.view(ids.numel(), -1)
        return matmul_ogs(act, w2, None, routing, scatter_indx=scatter, gammas=routing.gate_scal).view(x.shape)

    return call


def _route(ids: Tensor, scores: Tensor, num_experts: int) -> tuple[RoutingData, GatherIndx, ScatterIndx]:
    tokens, top_k = ids.shape
    num_words = triton.cdiv(num_experts, _WORD)
    bits = torch.empty((tokens, num_words), dtype=torch.int32, device=ids.device)
    pack_kernel[(tokens,)](ids, bits, num_words, TOP_K=top_k, WORDS=triton.next_power_of_2(num_words))
    shapes = {"shape": [tokens, num_words * _WORD], "shape_max": [tokens, None]}
    bits = bits.view(torch.uint32)
    if _LEGACY:
        from triton_kernels.routing import routing_from_bitmatrix

        mask = tensors.Bitmatrix(bits, **shapes, scratchpad=None)
        return routing_from_bitmatrix(mask, scores, ids, num_experts, top_k)
    mask = tensors.Bitmatrix(bits, dtype=tensors.BIT, **shapes)
    sparse = tensors.SparseMatrix(indx=ids, vals=scores, mask=mask)
    rows, routes = sparse.mask_metadata.row_sorted_indx, sparse.mask_metadata.col_sorted_indx
    ragged = tensors.make_ragged_tensor_metadata(sparse.mask_metadata.col_sum, rows.shape[0])
    routing = RoutingData(scores.flatten()[routes], ragged.block_sizes, num_experts, top_k, ragged)
    return routing, GatherIndx(routes, rows), ScatterIndx(rows, routes)
