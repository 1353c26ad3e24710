"""Decodes with a Qwen3-MoE of random weights: a compiled step in a CUDA graph, tokens per second by kind of experts.

    python examples/serve_block.py                     two layers of Qwen3-30B-A3B, a batch of 16
    python examples/serve_block.py --batch 1 --layers 4

A step feeds each sequence its last token, with a static key-value cache, and replaces it by the likeliest next one. It
is compiled without a graph break, captured, and replayed. Experts of transformers' "eager" look at the ids on the host:
they can be neither compiled whole nor captured, and run as they are. On the CPU there are no CUDA graphs, and the model
is a small one. The exit status is 1 if the logits of the prompt disagree with those of "eager".
"""

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

import moe_ops.integrations.transformers as integration

QUICK = bool(os.environ.get("MOE_OPS_EXAMPLE_QUICK"))
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", integration.NAME)
# Of the logits of a token from eager's. The token in the middle counts: a router that hesitates between two experts may
# take the other one after a different rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Sequences; logits take much memory.
_MOST_COMPARED = 4
# Those of Qwen3-30B-A3B, which has 48 layers and 151936 words.
SIZES = {
    **{"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
    **{"max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
}
SMALL = {
    **{"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True},
}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, default=2 if QUICK else 16, help="sequences (default %(default)s)")
    parser.add_argument("--layers", type=int, default=1 if QUICK else 2, help="default %(default)s")
    parser.add_argument("--prompt", type=int, default=8 if QUICK else 256, help="tokens before (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=4 if QUICK else 64, help="tokens to decode (default %(default)s)")
    parser.add_argument(
        "--backend", default="eager" if QUICK else "inductor", help="of torch.compile (default %(default)s)"
    )
    args = parser.parse_args()
    for name in ("batch", "layers", "prompt", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.backend not in torch.compiler.list_backends(exclude_tags=()):
        parser.error(f"--backend {args.backend!r} is none of torch.compile's")
    return args


def make_model(layers: int, vocabulary: int, device: str, dtype: torch.dtype, sizes: dict = SIZES) -> nn.Module:
    """A Qwen3-MoE with random weights, made on the device."""
    config = transformers.Qwen3MoeConfig(
        **sizes, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=dtype, experts_implementation="grouped_mm")
    return model.eval()


class Decoder:
    """A model, its cache, and the next token of every sequence.

    Attributes:
        tokens: [batch, 1]; a step replaces them.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, steps: int) -> None:
        """Runs the prompt [batch, length]; there is room for so many steps."""
        self.model, self.length = model, prompt.shape[1]
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=self.length + steps)
        # Its name since transformers 5.24.
        named = "cache" in inspect.signature(model.model.forward).parameters
        self.options = {"cache" if named else "past_key_values": self.cache, "use_cache": True}
        logits = model(prompt, logits_to_keep=1, **self.options).logits
        self.first = logits[:, -1].argmax(-1, keepdim=True)
        self.tokens = self.first.clone()

    def step(self) -> Tensor:
        """One token for every sequence; the logits [batch, words] that it was taken from."""
        logits = self.model(self.tokens, **self.options).logits[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        self.tokens.copy_(self.first)


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: a function that replays it and returns the tensor its result is in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and loads kernels: neither belongs into a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def make_step(decoder: Decoder, name: str, backend: str) -> tuple[Callable[[], Tensor], str]:
    """The step with a kind of experts, and how it runs."""
    decoder.model.set_experts_implementation(name)
    decoder.rewind()
    if name == "eager":
        return decoder.step, "not compiled"
    compiled = torch.compile(decoder.step, fullgraph=True, backend=backend)
    if decoder.tokens.is_cuda:
        return capture(compiled), "compiled, CUDA graph"
    return compiled, "compiled"


@torch.no_grad()
def main() -> int:
    """Runs the example; the exit status."""
    args = parse_args()
    transformers.logging.set_verbosity_error()
    integration.register()
    small = QUICK or args.device == "cpu"
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    vocabulary = 256 if small else 151936 * args.layers // 48
    model = make_model(args.layers, vocabulary, args.device, dtype, SMALL if small else SIZES)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.layers} layer(s), {size:,} parameters, {vocabulary} words, {dtype}, {args.device}")
    prompt = torch.randint(vocabulary, (args.batch, args.prompt), device=args.device)
    decoder, expected, tokens, good = Decoder(model, prompt, args.tokens), None, None, True
    for name in IMPLEMENTATIONS:
        step, how = make_step(decoder, name, args.backend)
        logits = model(prompt[:_MOST_COMPARED], use_cache=False).logits.float()
        expected = logits if expected is None else expected
        difference = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
        good &= difference <= TOLERANCE[dtype]
        step()
        first = decoder.tokens.clone()
        tokens = first if tokens is None else tokens
        decoder.rewind()
        start = time.perf_counter()
        for _ in range(args.tokens):
            step()
        decoder.tokens.cpu()  # waits for the device
        speed = args.batch * args.tokens / (time.perf_counter() - start)
        same = f"{(first == tokens).sum()} of {args.batch} first tokens the same"
        print(f"{name:10} {speed:10.0f} tokens/s ({how}); logits differ by {difference:.1e}, {same}")
    print(f"logits: {'agree' if good else 'DISAGREE'} (allowed: {TOLERANCE[dtype]:.0e})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
