"""The operators' names and schemas, in one place.

The schema of `fused_moe_tma` is frozen: a saved program binds its arguments by position and name, so inserting or
renaming one would silently hand it another tensor. New tensors go before the `*`, new scalars at the end, and
`tests/ops/test_schema.py` pins the text.
"""

NAMESPACE = "moe_ops"

_ARGUMENTS = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? w1_bias=None, Tensor? w2_bias=None, Tensor? w1_scale=None, Tensor? w2_scale=None, "
    "Tensor? w1_zero_point=None, Tensor? w2_zero_point=None, Tensor? a1_scale=None, Tensor? a2_scale=None, "
    "Tensor? expert_map=None, *, "
    'str activation="silu", float? activation_alpha=None, float? activation_limit=None, '
    'str gate_up_layout="concatenated", str quantization="none", int[]? block_shape=None, '
    "bool apply_router_weight_on_input=False, float routed_scaling_factor=1.0, bool reduce_topk=True, "
    'bool deterministic=True, str path="auto", ScalarType? out_dtype=None'
)

FUSED_MOE = f"fused_moe_tma({_ARGUMENTS}) -> Tensor"

# The caller's buffer instead of a new one. There is no `.out` overload on purpose: Inductor 2.13 lowers the functional
# op to a registered `.out` variant and passes keyword-only arguments twice.
FUSED_MOE_ = f"fused_moe_tma_(Tensor(a!) out, {_ARGUMENTS}) -> ()"

ROUTE = (
    "route(Tensor topk_ids, int num_experts, int block, Tensor? expert_map=None) -> (Tensor, Tensor, Tensor, Tensor)"
)

TOPK_ROUTE = (
    "topk_route(Tensor logits, int top_k, Tensor? correction_bias=None, *, "
    'str scoring="softmax", bool renormalize=False, int num_groups=1, int topk_groups=1, str group_score="max", '
    "float routed_scaling_factor=1.0) -> (Tensor, Tensor)"
)

# Stands where a gradient of `fused_moe_tma` would be computed: traces like any op, raises when it runs.
NO_BACKWARD = "_no_backward(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor"
