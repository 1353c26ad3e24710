"""Quantised weights and activations: the formats, and what their values mean."""

from moe_ops.quantization.activations import dequantize_activations, quantize_activations
from moe_ops.quantization.dequantize import dequantize, unpack
from moe_ops.quantization.scheme import FORMATS, UNQUANTIZED, Scheme, check_scales, make_scheme

__all__ = [
    "FORMATS",
    "UNQUANTIZED",
    "Scheme",
    "check_scales",
    "dequantize",
    "dequantize_activations",
    "make_scheme",
    "quantize_activations",
    "unpack",
]
