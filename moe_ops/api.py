"""The public functions: typed and documented, one op call each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops import plans, registration  # noqa: F401  (registration defines the ops)
from moe_ops.arguments import Arguments
from moe_ops.dispatch import Plan
from moe_ops.routing import Routing

# The overload, which a call through the packet has to look for every time.
_FUSED_MOE = torch.ops.moe_ops.fused_moe_tma.default


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    w1_zero_point: Tensor | None = None,
    w2_zero_point: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    expert_map: Tensor | None = None,
    *,
    activation: str = "silu",
    activation_alpha: float | None = None,
    activation_limit: float | None = None,
    gate_up_layout: str = "concatenated",
    quantization: str = "none",
    block_shape: Sequence[int] | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling_factor: float = 1.0,
    reduce_topk: bool = True,
    deterministic: bool = True,
    path: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs a Mixture-of-Experts feed-forward block: gather, up GEMM, activation, down GEMM, combine.

    With e = topk_ids[m, k]::

        out[m] = routed_scaling_factor
                 * sum_k topk_weights[m, k] * (act(x[m] @ w1[e]^T + b1[e]) @ w2[e]^T + b2[e])

    Matrix products, bias, activation and the sum over k are computed in fp32. The activation and each route's output
    are rounded once, to the compute dtype, and the result to its own; on the CPU in 16 bits the up projection may be
    rounded once more. The compute dtype is that of `hidden_states`; where those arrive quantised, it is `out_dtype` if
    that has 16 bits, else bfloat16. What quantised weights add to the roundings is in docs/op.md. This is
    `torch.ops.moe_ops.fused_moe_tma` with types and a docstring.

    In the shapes of quantised tensors, quotients are rounded up, and a weight is [E, N, K]: N are its rows, K = H for
    `w1` and I for `w2`.

    Args:
        hidden_states: x, [M, H], bfloat16, float16 or float32; any strides. M may be 0. With "fp8_w8a8" also e4m3fn,
            with "int8_w8a8" also int8; then `a1_scale` is needed.
        w1: gate and up weights, [E, 2 * I, H], or [E, I, H] for an activation that ends in "_no_gate"; the dtype of
            `hidden_states`; any strides (K-major and N-major ones can go by TMA). Quantised: float8_e4m3fn or
            float8_e5m2 ("fp8_w8a8"), int8 ("int8_w8a8", "int8_w8a16"), or uint8 [E, N, K / 2] with the even column in
            the low nibble ("int4_w4a16", "mxfp4_w4a16"; for the latter [E, N, K / 32, 16] too); K-major ones can go by
            TMA.
        w2: down weights, [E, H, I], likewise.
        topk_weights: routing weights, [M, top_k], any floating-point dtype of at least 16 bits.
        topk_ids: expert of each route, [M, top_k], int32 or int64. A route whose id is not in 0 .. E - 1 contributes
            exactly 0, whatever its weight. Duplicate ids add up; top_k may exceed E.
        w1_bias: [E, rows of w1] in the row order of `w1`, the compute dtype or float32.
        w2_bias: [E, H], likewise.
        w1_scale: scales of quantised `w1`, float32, bfloat16 or float16: [E] ("fp8_w8a8"), [E, N] (not for 4 bits),
            [E, N / 128, K / 128] with blocks, [E, N, K / g] with groups. "mxfp4_w4a16": uint8 or float8_e8m0fnu
            [E, N, K / 32].
        w2_scale: scales of quantised `w2`, likewise.
        w1_zero_point: zero points of `w1` in groups, uint8: [E, N, K / g] ("int8_w8a16"), or [E, N / 2, K / g] with
            the even row in the low nibble ("int4_w4a16"). Without them, int8 has 0 and int4 has 8 for zero.
        w2_zero_point: zero points of `w2`, likewise; both or none.
        a1_scale: scales of quantised `hidden_states`, float32: [1] or [M, 1], with blocks [1] or [M, H / 128]. For
            others [1], with which "fp8_w8a8" without blocks quantises them; None: the op scales them by their maxima,
            per token, with blocks per 128 columns.
        a2_scale: the scale with which "fp8_w8a8" without blocks quantises the activation, float32: [1], or [E], one
            per expert. None: the op scales it by its maxima, likewise.
        expert_map: [E_global] int32. `topk_ids` then index it, and its values are the experts; a value outside
            0 .. E - 1 drops the route.
        activation: "silu", "gelu" (erf), "gelu_tanh", "swigluoai" (gpt-oss: g * sigmoid(alpha * g) * (u + 1)), or
            without a gate "silu_no_gate", "gelu_no_gate", "relu2_no_gate" (relu(x)^2).
        activation_alpha: alpha of "swigluoai"; 1.702 by default.
        activation_limit: clamps the gate to at most this, and up to +- this, before a "silu" (default: no clamp) or
            "swigluoai" (default: 7.0) activation.
        gate_up_layout: order of the rows of `w1`: "concatenated" (I gate rows, I up rows) or "interleaved" (g0, u0,
            g1, u1, ...).
        quantization: how the weights are stored: "none", "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16" or
            "mxfp4_w4a16". Those in "w8a8" round hidden states and activation to e4m3fn or int8 as well. fp8 on a GPU
            needs compute capability 8.9.
        block_shape: (rows, columns) of the weights that share a scale: (128, 128) blocks in the formats "w8a8"; groups
            (0, g) with g = 32, 64 or 128 in "int8_w8a16" and, always, "int4_w4a16"; (0, 32) in "mxfp4_w4a16", where
            it may be left out. None: a scale per row or, in "fp8_w8a8", per tensor.
        apply_router_weight_on_input: the routing weight multiplies x @ w1^T, in fp32 and before the bias, and not the
            output.
        routed_scaling_factor: multiplies the result.
        reduce_topk: False returns the routes, weighted and scaled, instead of their sum.
        deterministic: True: equal inputs give equal bits. False permits a combine whose order of additions varies.
        path: "auto" (TMA on NVIDIA GPUs of compute capability 9.0 and later where the weights can be described to it,
            else the classic kernels, the CPU kernel for CPU tensors), "tma", "classic", or "reference" (float64, slow).
        out_dtype: dtype of the result, bfloat16, float16 or float32; by default the compute dtype.

    Returns:
        [M, H], or [M, top_k, H] with `reduce_topk=False`; contiguous, on the device of `hidden_states`.

    Raises:
        ValueError: a shape, device, option or combination of options is wrong, or `path` or the format cannot run; the
            message names the argument, what it got, what it expected, and the way out.
        TypeError: a dtype is wrong.
        NotImplementedError: a backward pass was run.

    Example:
        >>> import torch, moe_ops
        >>> num_tokens, hidden, intermediate, experts, top_k = 5, 64, 32, 4, 2
        >>> x = torch.randn(num_tokens, hidden)
        >>> w1 = torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5
        >>> w2 = torch.randn(experts, hidden, intermediate) / intermediate**0.5
        >>> scores = torch.randn(num_tokens, experts).softmax(-1)
        >>> topk_weights, topk_ids = scores.topk(top_k)
        >>> moe_ops.fused_moe(x, w1, w2, topk_weights, topk_ids).shape
        torch.Size([5, 64])

    Source:
        The fused MoE kernels of vLLM and SGLang for the layout of the operands; gpt-oss for "swigluoai".
    """
    return _FUSED_MOE(
        hidden_states, w1, w2, topk_weights, topk_ids, w1_bias, w2_bias, w1_scale, w2_scale, w1_zero_point,
        w2_zero_point, a1_scale, a2_scale, expert_map,
        activation=activation, activation_alpha=activation_alpha, activation_limit=activation_limit,
        gate_up_layout=gate_up_layout, quantization=quantization, block_shape=block_shape,
        apply_router_weight_on_input=apply_router_weight_on_input, routed_scaling_factor=routed_scaling_factor,
        reduce_topk=reduce_topk, deterministic=deterministic, path=path, out_dtype=out_dtype,
    )  # fmt: skip


def explain(*args: Any, **kwargs: Any) -> Plan:
    """Says how `fused_moe` would run a call: the path, why, the tiles and the workspace. Runs nothing.

    Args:
        *args: as `fused_moe`.
        **kwargs: as `fused_moe`.

    Returns:
        A `Plan`; `print` it to read it.

    Raises:
        ValueError, TypeError: as `fused_moe` would.

    Example:
        >>> import torch, moe_ops
        >>> x, ids = torch.randn(1, 16), torch.zeros(1, 1, dtype=torch.int32)
        >>> plan = moe_ops.explain(x, torch.randn(2, 16, 16), torch.randn(2, 16, 8), torch.ones(1, 1), ids)
        >>> plan.path, plan.reason
        ('cpu', 'the tensors are on the CPU')
    """
    return plans.plan(Arguments(*args, **kwargs))[1]


def route(topk_ids: Tensor, num_experts: int, block: int, expert_map: Tensor | None = None) -> Routing:
    """Sorts routes by expert, each expert padded to whole blocks of rows: the order all stages of the op share.

    Route r = m * top_k + k has row inverse[r]. Routes of one expert keep their order (a stable sort), so equal inputs
    give equal results. On CUDA nothing is read back to the host.

    Args:
        topk_ids: [M, top_k] int32 or int64; any values: those that are not an expert's are dropped.
        num_experts: E, at least 1.
        block: rows of a block, 1 to 1024.
        expert_map: [E_global] int32, or None; see `fused_moe`.

    Returns:
        A `Routing` of four int32 tensors: `sorted_routes` [max_tiles * block] (R = M * top_k in padding rows),
        `tile_experts` [max_tiles] (-1 past the last block), `num_padded` [1], `inverse` [R] (-1 for a dropped route).

    Raises:
        ValueError: a shape, size or device is wrong.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch, moe_ops
        >>> routing = moe_ops.route(torch.tensor([[1, 0], [1, 7]]), num_experts=2, block=2)
        >>> routing.sorted_routes.tolist(), routing.inverse.tolist(), routing.num_padded.tolist()
        ([1, 4, 0, 2, 4, 4], [2, 0, 3, -1], [4])
    """
    return Routing(*torch.ops.moe_ops.route(topk_ids, num_experts, block, expert_map))


def topk_route(
    logits: Tensor,
    top_k: int,
    correction_bias: Tensor | None = None,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Routes tokens: the experts of each, and their weights, from a router's logits.

        scores = softmax(logits), sigmoid(logits) or sqrt(softplus(logits)), in fp32
        choice = scores + correction_bias                  only chooses
        ids[m] = the top_k largest choice[m] in the topk_groups best groups, the largest first
        weights[m] = scores[m, ids[m]] * routed_scaling_factor, divided by their sum before if renormalize

    With scoring "topk_softmax" choice is logits + correction_bias, and weights are the softmax of the chosen logits.
    The experts of a group are consecutive; a group is as good as its best choice, or as the sum of its two best. Of
    equal choices the lower expert, or group, comes first; NaN ranks with -inf, so that ids are always experts, and
    different ones. A weight that is NaN stays so.

    Args:
        logits: [M, E], fp32, bf16 or fp16, any strides; E at most 4096.
        top_k: experts of a token, 1 to those of topk_groups groups.
        correction_bias: [E] fp32, bf16 or fp16, or None.
        scoring: "softmax" (Mixtral, Qwen3 and OLMoE with renormalize or without), "topk_softmax" (gpt-oss), "sigmoid"
            (DeepSeek-V3, with a bias, renormalize, groups and "top2") or "sqrtsoftplus".
        renormalize: whether the weights of a token sum to 1 before the factor; with "topk_softmax" they do anyway.
        num_groups: a divisor of E.
        topk_groups: groups that experts are taken from, 1 to num_groups.
        group_score: "max" or "top2".
        routed_scaling_factor: multiplies the weights; then leave that of `fused_moe` out.

    Returns:
        weights [M, top_k] fp32 and ids [M, top_k] int32, as `fused_moe` takes them.

    Raises:
        ValueError: a shape, size, name or device is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: a backward runs; there is none.

    Example:
        >>> import torch, moe_ops
        >>> weights, ids = moe_ops.topk_route(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), top_k=2, renormalize=True)
        >>> weights.tolist(), ids.tolist()
        ([[0.5, 0.5]], [[1, 3]])
    """
    return torch.ops.moe_ops.topk_route(
        logits, top_k, correction_bias, scoring=scoring, renormalize=renormalize, num_groups=num_groups,
        topk_groups=topk_groups, group_score=group_score, routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip
