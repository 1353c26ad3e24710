"""Quantises the experts of a Mixture-of-Experts model, and runs them through moe_ops beside the unquantised ones.

A Qwen3-MoE with random weights; nothing is downloaded. For each format: the time of a forward, the memory of the
experts' weights, and how far the logits are from those of the unquantised experts, and from those of experts with the
numbers that the quantised ones stand for. The exit status is 1 if the latter is more than roundings explain.
"""

import argparse
import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops
import moe_ops.env
import moe_ops.integrations.transformers as integration
from moe_ops.quantization import dequantize, quantize_weights

QUICK = moe_ops.env.flag("MOE_OPS_EXAMPLE_QUICK")
MODEL = {
    "vocab_size": 256,
    "hidden_size": 128 if QUICK else 256,
    "moe_intermediate_size": 64 if QUICK else 128,
    "num_hidden_layers": 2 if QUICK else 4,
    "num_experts": 8 if QUICK else 16,
    "num_experts_per_tok": 2 if QUICK else 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16 if QUICK else 32,
    "initializer_range": 0.06,
}
# name: the op's quantization, options of quantize_weights.
FORMATS = {
    "fp8-tensor": ("fp8_w8a8", {"granularity": "tensor"}),
    "fp8-channel": ("fp8_w8a8", {"granularity": "channel"}),
    "fp8-block": ("fp8_w8a8", {"block_shape": (128, 128)}),
    "int8-channel": ("int8_w8a8", {}),
    "int8-block": ("int8_w8a8", {"block_shape": (128, 128)}),
    "int8-weights": ("int8_w8a16", {}),
    "int8-groups": ("int8_w8a16", {"block_shape": (0, 64), "zero_points": True}),
    "int4-groups": ("int4_w4a16", {"block_shape": (0, 64)}),
    "int4-zero-points": ("int4_w4a16", {"block_shape": (0, 64), "zero_points": True}),
    "mxfp4": ("mxfp4_w4a16", {}),
}
# What the logits may be off those with the dequantised weights, root mean square, as a part of their own: rounding
# activations to 8 bits makes some percent, and where two experts are close to a tie, another one may be taken.
ROUNDED_ROWS, ROWS_IN_16_BITS, ROWS_IN_FLOAT32 = 0.3, 0.1, 1e-3


class QuantizedExperts(nn.Module):
    """The experts of a layer, in a format of the op; it stands in for transformers' module."""

    def __init__(self, experts: nn.Module, quantization: str, options: dict):
        super().__init__()
        self.quantization, self.block_shape = quantization, options.get("block_shape")
        for which, weight in (("w1", experts.gate_up_proj), ("w2", experts.down_proj)):
            made = quantize_weights(weight.detach(), quantization, **options)
            self.register_buffer(which, made.weight)
            self.register_buffer(f"{which}_scale", made.scale)
            self.register_buffer(f"{which}_zero_point", made.zero_point)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: one call of the op."""
        return moe_ops.fused_moe(
            hidden_states,
            self.w1,
            self.w2,
            top_k_weights,
            top_k_index,
            w1_scale=self.w1_scale,
            w2_scale=self.w2_scale,
            w1_zero_point=self.w1_zero_point,
            w2_zero_point=self.w2_zero_point,
            quantization=self.quantization,
            block_shape=self.block_shape,
        )

    def numbers(self, which: str, dtype: torch.dtype) -> Tensor:
        """What the weights stand for."""
        scale, zero_point = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero_point")
        options = {"block_shape": self.block_shape, "zero_point": zero_point}
        return dequantize(getattr(self, which), scale, self.quantization, **options).to(dtype)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--format", choices=("all", *FORMATS), default="all", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda, else float32")
    parser.add_argument("--tokens", type=int, default=32 if QUICK else 128, help="of the forward (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=2 if QUICK else 5, help="of the timing (default %(default)s)")
    args = parser.parse_args()
    if args.tokens < 1 or args.repeats < 1:
        parser.error("--tokens and --repeats must be at least 1")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    return args


def put_experts(model: nn.Module, experts: list[nn.Module]) -> None:
    """Gives every layer its experts."""
    for layer, module in zip(model.model.layers, experts, strict=True):
        layer.mlp.experts = module


def put_numbers(experts: list[nn.Module], quantized: list[QuantizedExperts]) -> None:
    """Overwrites the weights of unquantised experts by those that quantised ones stand for."""
    for module, source in zip(experts, quantized, strict=True):
        module.gate_up_proj.copy_(source.numbers("w1", module.gate_up_proj.dtype))
        module.down_proj.copy_(source.numbers("w2", module.down_proj.dtype))


def size(experts: list[nn.Module]) -> float:
    """MiB of all parameters and buffers: weights, scales, zero points."""
    tensors = [tensor for module in experts for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def milliseconds(model: nn.Module, ids: Tensor, repeats: int) -> float:
    """Median time of a forward, the first ones left out."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        model(ids).logits.cpu()  # The copy waits for the device.
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def distance(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a part of what was expected."""
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def allowed(quantization: str, dtype: torch.dtype) -> float:
    """What the logits may be off those with dequantised weights."""
    if quantization.endswith("w8a8"):
        return ROUNDED_ROWS
    return ROWS_IN_FLOAT32 if dtype == torch.float32 else ROWS_IN_16_BITS


@torch.no_grad()
def main() -> int:
    """Runs the example; the exit status."""
    args = parse_args()
    transformers.logging.set_verbosity_error()
    integration.register()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**MODEL)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_ops", dtype=args.dtype)
    model.to(args.device).eval()
    ids = torch.randint(MODEL["vocab_size"], (1, args.tokens), device=args.device)
    plain = [layer.mlp.experts for layer in model.model.layers]
    weights = [(module.gate_up_proj.clone(), module.down_proj.clone()) for module in plain]
    expected = model(ids).logits.float()

    print(f"{model.num_parameters():,} parameters, {args.tokens} tokens, {args.dtype}, {args.device}")
    print(f"{'experts':18}{'ms':>8}{'MiB':>8}  logits from unquantised, from dequantised")
    print(f"{'unquantised':18}{milliseconds(model, ids, args.repeats):8.1f}{size(plain):8.1f}")
    good = True
    for name in FORMATS if args.format == "all" else (args.format,):
        quantization, options = FORMATS[name]
        quantized = [QuantizedExperts(module, quantization, options) for module in plain]
        put_experts(model, quantized)
        got = model(ids).logits.float()
        time_of_it = milliseconds(model, ids, args.repeats)
        put_experts(model, plain)
        put_numbers(plain, quantized)
        error = distance(got, model(ids).logits.float())
        for module, (w1, w2) in zip(plain, weights, strict=True):
            module.gate_up_proj.copy_(w1)
            module.down_proj.copy_(w2)
        # A NaN is not at most anything.
        right = error <= allowed(quantization, args.dtype)
        good = good and right
        print(
            f"{name:18}{time_of_it:8.1f}{size(quantized):8.1f}  {distance(got, expected):16.1e}, {error:16.1e}"
            f"{'' if right else '  WRONG: more than roundings'}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
