"""Generates tokens with a model of any family of docs/models.md, its experts in the op and in transformers' own code.

    python examples/hf_generate.py                          a tiny random Qwen3-MoE
    python examples/hf_generate.py gpt_oss                  a tiny random model of another family
    python examples/hf_generate.py --model FOLDER           a checkpoint, in bfloat16 on a GPU

Of a random model the tokens are numbers. The exit status is 1 if the logits disagree.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "0" if "--model" in " ".join(sys.argv) else "1")

import torch
import transformers
from torch import Tensor, nn

import moe_ops.integrations.transformers as integration
from scripts import families

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("family", nargs="?", default="qwen3_moe", help="a row of docs/models.md (default %(default)s)")
    parser.add_argument("--model", help="a checkpoint's folder or name, instead of a random model")
    parser.add_argument("--prompt", default="The experts of a model", help="for a checkpoint (default %(default)r)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 for a checkpoint on cuda")
    args = parser.parse_args()
    if args.model is None and args.family not in families.families():
        parser.error(f"{args.family!r} is no family with transformers' experts interface; see docs/models.md")
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.model and args.device == "cuda" else "float32"))
    return args


def load(args: argparse.Namespace) -> tuple[nn.Module, Tensor, object | None]:
    """The model, the prompt's tokens [1, length], and the tokenizer of a checkpoint."""
    if args.model is None:
        cls = families.model_classes(args.family)[0]
        if not cls.can_generate():
            raise SystemExit(f"{args.family} has no model of text alone that generates; its first is {cls.__name__}")
        model = families.build(cls, args.family)
        prompt, tokenizer = torch.arange(1, 17)[None], None
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        prompt = tokenizer(args.prompt, return_tensors="pt").input_ids
    return model.to(args.device, args.dtype).eval(), prompt.to(args.device), tokenizer


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, tokens: int, implementation: str) -> tuple[Tensor, Tensor, float]:
    """The prompt's logits, the tokens that follow, and tokens per second."""
    model.set_experts_implementation(implementation)
    logits = model(prompt, use_cache=False).logits
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=1, **options)  # compiles
    start = time.perf_counter()
    written = model.generate(prompt, max_new_tokens=tokens, **options)[0, prompt.shape[1] :].cpu()
    return logits, written, len(written) / (time.perf_counter() - start)


def main() -> int:
    """Runs the example; the exit status."""
    args = parse_args()
    families.quiet()
    # A fallback says why.
    logging.basicConfig(format="%(name)s: %(message)s")
    integration.LOGGER.setLevel(logging.WARNING)
    integration.register()
    model, prompt, tokenizer = load(args)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {size:,} parameters, {args.dtype}, {args.device}")
    results = {name: generate(model, prompt, args.tokens, name) for name in ("eager", integration.NAME)}
    for name, (_, written, speed) in results.items():
        text = written.tolist() if tokenizer is None else repr(tokenizer.decode(written))
        print(f"{name:8} {speed:8.1f} tokens/s: {text}")
    (expected, one, _), (got, other, _) = results.values()
    difference = families.difference(got.float(), expected.float())
    same = "the same" if torch.equal(one, other) else "not all the same"
    print(f"logits differ by {difference:.1e} of the largest (allowed: {TOLERANCE[args.dtype]:.0e}); tokens: {same}")
    return 0 if difference <= TOLERANCE[args.dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
