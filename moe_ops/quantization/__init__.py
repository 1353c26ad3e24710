"""Quantised weights and activations: the formats, and what their values mean."""

from moe_ops.quantization.activations import dequantize_activations, quantize_activations
from moe_ops.quantization.checkpoints import from_awq, from_gptq
from moe_ops.quantization.dequantize import dequantize, unpack
from moe_ops.quantization.quantize import QuantizedWeights, pack, quantize_weights
from moe_ops.quantization.scheme import FORMATS

__all__ = [
    "FORMATS",
    "QuantizedWeights",
    "dequantize",
    "dequantize_activations",
    "from_awq",
    "from_gptq",
    "pack",
    "quantize_activations",
    "quantize_weights",
    "unpack",
]
