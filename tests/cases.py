"""Calls that every path must get right; shared by the interpreter and the GPU tests.

Each one is there for a reason, given as its name: an option, a tail, a routing that once broke a kernel somewhere.
"""

import torch

from moe_ops.arguments import Arguments
from moe_ops.testing import random_inputs

SMALL = {"num_tokens": 21, "hidden": 72, "intermediate": 40, "experts": 5, "top_k": 3}

OPTIONS = {
    "plain": {},
    "one_token": {"num_tokens": 1},
    "one_expert_all_there_is": {"experts": 1, "top_k": 1},
    "top_k_above_experts": {"experts": 2, "top_k": 5},
    "tails_in_both_dimensions": {"hidden": 136, "intermediate": 104},
    "many_experts_few_tokens": {"experts": 60, "num_tokens": 3},
    "all_to_one_expert": {"routing": "one_expert"},
    "empty_experts": {"routing": "sparse", "experts": 10},
    "duplicate_ids": {"routing": "duplicates"},
    "skewed": {"routing": "zipf"},
    "hostile_ids_int32": {"routing": "hostile"},
    "hostile_ids_int64": {"routing": "hostile", "index_dtype": torch.int64},
    "biases": {"bias": True},
    "biases_interleaved": {"bias": True, "gate_up_layout": "interleaved"},
    "n_major": {"n_major": True},
    "n_major_interleaved": {"n_major": True, "gate_up_layout": "interleaved"},
    "router_weight_on_input": {"bias": True, "apply_router_weight_on_input": True},
    "routes_unsummed": {"reduce_topk": False, "routing": "hostile"},
    "scaled": {"routed_scaling_factor": 2.5},
    "out_float32": {"out_dtype": torch.float32},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "swigluoai": {"activation": "swigluoai", "gate_up_layout": "interleaved", "bias": True},
    "swigluoai_own_slope": {"activation": "swigluoai", "activation_alpha": 1.1, "activation_limit": 0.7},
    "silu_clamped": {"activation": "silu", "activation_limit": 0.8},
    "silu_no_gate": {"activation": "silu_no_gate", "bias": True},
    "gelu_no_gate": {"activation": "gelu_no_gate"},
    "relu2_no_gate": {"activation": "relu2_no_gate", "n_major": True},
}


def option_case(name: str, dtype: torch.dtype, device: str = "cpu", **sizes) -> Arguments:
    """The call of that name; `sizes` stand in for those of SMALL, the case's own above both."""
    return random_inputs(dtype=dtype, device=device, **{**SMALL, **sizes, **OPTIONS[name]})


def run(args: Arguments, **overrides) -> torch.Tensor:
    """Runs a call through the op."""
    values = {name: getattr(args, name) for name in args.__slots__} | overrides
    return torch.ops.moe_ops.fused_moe_tma(**values)
