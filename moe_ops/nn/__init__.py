"""Modules around the op: experts with their weights, and a whole MoE layer. For inference: there is no backward."""

from moe_ops.nn.convert import convert_hf_state_dict
from moe_ops.nn.experts import FusedExperts
from moe_ops.nn.layer import MoELayer, SharedExpert

__all__ = ["FusedExperts", "MoELayer", "SharedExpert", "convert_hf_state_dict"]
