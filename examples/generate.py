"""Generates text with a Mixture-of-Experts model whose experts run through moe_ops.

A small Qwen3-MoE learns to write like this repository's own text, byte by byte: 40 seconds, and then the weights
are kept for the next run. It is loaded back with experts_implementation="moe_ops", compared with transformers' own
experts and timed. Nothing is downloaded. The exit status is 1 if the logits disagree.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops.env
import moe_ops.integrations.transformers as integration

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

ROOT = Path(__file__).resolve().parent.parent
QUICK = moe_ops.env.flag("MOE_OPS_EXAMPLE_QUICK")
MODEL = {
    "vocab_size": 256,
    "hidden_size": 32 if QUICK else 128,
    "moe_intermediate_size": 16 if QUICK else 32,
    "num_hidden_layers": 2 if QUICK else 4,
    "num_experts": 8 if QUICK else 16,
    "num_experts_per_tok": 2 if QUICK else 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8 if QUICK else 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
}
CONTEXT = 64 if QUICK else 128
BATCH = {"cpu": 4, "cuda": 64}
LEARNING_RATE = 3e-3
IMPLEMENTATIONS = ("eager", "grouped_mm", "moe_ops")
# What the logits may be off, root mean square, as a part of their own: in float32 this much. In 16 bits every layer
# rounds, a tie between two experts may go either way, and the yardstick is how far transformers' experts are off.
FLOAT32_TOLERANCE, YARDSTICKS = 1e-5, 2.0


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda, else float32")
    parser.add_argument("--seconds", type=float, default=2 if QUICK else 40, help="time to train (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=24 if QUICK else 200, help="bytes to write (default %(default)s)")
    parser.add_argument("--prompt", default='"""The experts ', help="text to go on from (default %(default)r)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "generate", help="folder for trained weights")
    args = parser.parse_args()
    if not args.prompt or args.tokens < 1 or args.seconds <= 0:
        parser.error("--prompt must not be empty, --tokens must be at least 1, --seconds above 0")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    return args


def corpus() -> str:
    """The repository's documents and sources, one text."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("moe_ops/**/*.py"), Path(__file__)]
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))


def encode(text: str) -> Tensor:
    """The tokens are the bytes: [length] int64."""
    return torch.tensor(list(text.encode()))


def decode(ids: Tensor) -> str:
    """The text of [length] tokens."""
    return bytes(ids.tolist()).decode(errors="replace")


def train(data: Tensor, device: str, seconds: float) -> Qwen3MoeForCausalLM:
    """Trains a model from nothing for that long. The op has no backward, so the experts are transformers' own."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**MODEL), experts_implementation="grouped_mm").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    windows = data.to(device).unfold(0, CONTEXT, 1)
    bar = None
    if tqdm:  # nothing in a pipe
        form = "training: {percentage:3.0f}%|{bar:40}|{postfix}"
        bar = tqdm(total=round(seconds, 1), bar_format=form, disable=None)
    losses, start = [], time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        part = elapsed / seconds
        warmup = min(1.0, (len(losses) + 1) / 20)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * (0.05 + 0.95 * math.cos(part * math.pi / 2) ** 2)
        batch = windows[torch.randint(len(windows), (BATCH[device],), device=device)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if bar:
            bar.set_postfix_str(f"step {len(losses)}, loss {losses[-1]:.2f}", refresh=False)
            bar.update(min(time.monotonic() - start, bar.total) - bar.n)
    if bar:
        bar.close()
    end = sum(losses[-10:]) / len(losses[-10:])
    print(f"trained {len(losses)} steps in {elapsed:.0f} s: loss {losses[0]:.2f} at the start, {end:.2f} at the end")
    return model


def trained_weights(cache: Path, device: str, seconds: float) -> Path:
    """The folder of the trained model: one per configuration, made if it is not there."""
    settings = [MODEL, CONTEXT, BATCH[device], LEARNING_RATE, seconds]
    folder = cache / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if folder.exists():
        print(f"weights: {folder} (trained in an earlier run)")
        return folder
    data = encode(corpus())
    print(f"training on {len(data):,} bytes of this repository for {seconds:g} s on {device}")
    model = train(data, device, seconds)
    # Saved aside and then renamed: a run that is interrupted leaves no half of a model behind.
    cache.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(dir=cache)
    model.save_pretrained(aside)
    try:
        os.rename(aside, folder)
    except OSError:  # Another run was faster.
        shutil.rmtree(aside)
    print(f"weights: {folder}")
    return folder


@torch.no_grad()
def logits(model: Qwen3MoeForCausalLM, ids: Tensor, steps: int = 8) -> Tensor:
    """The logits of [1, length] tokens: all but the last `steps` at once (prefill), those one by one (decode)."""
    result = model(ids[:, :-steps], use_cache=True)
    parts, past = [result.logits], result.past_key_values
    for step in range(ids.shape[1] - steps, ids.shape[1]):
        result = model(ids[:, step : step + 1], past_key_values=past, use_cache=True)
        parts.append(result.logits)
    return torch.cat(parts, 1)[0].float()


def agrees(model: Qwen3MoeForCausalLM, ids: Tensor) -> bool:
    """Compares the logits through the op with those of transformers' eager experts, and prints how they differ."""
    model.set_experts_implementation("moe_ops")
    got = logits(model, ids)
    model.set_experts_implementation("eager")
    eager = logits(model, ids)
    exact = logits(copy.deepcopy(model).float(), ids)
    difference = ((got - eager).abs().max() / eager.abs().max()).item()
    same = (got.argmax(-1) == eager.argmax(-1)).float().mean().item()
    error, yardstick = (((x - exact).square().mean() / exact.square().mean()).sqrt().item() for x in (got, eager))
    allowed = max(FLOAT32_TOLERANCE, YARDSTICKS * yardstick)
    # A NaN is not at most anything.
    good = error <= allowed
    print(f"logits of {len(got)} tokens, moe_ops against eager experts: {'agree' if good else 'DISAGREE'}")
    print(f"  largest difference {difference:.1e} of the largest logit, same best token {same:.1%}")
    print(f"  error against float32: moe_ops {error:.1e}, eager {yardstick:.1e} (allowed: {allowed:.1e})")
    return good


def print_plans(model: Qwen3MoeForCausalLM, ids: Tensor) -> None:
    """Says how the op runs the first layer's experts: for many tokens at once, and for one."""

    def show(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        plan = integration.plan_of(module, *inputs)
        print(f"  {len(inputs[0])} token(s): {plan.path} ({plan.reason})")

    print("path of the op:")
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(show)
    with torch.no_grad():
        model(ids)
        model(ids[:, :1])
    handle.remove()


def generate(model: Qwen3MoeForCausalLM, ids: Tensor, tokens: int, **options) -> Tensor:
    """Goes on from [1, length] tokens for that many more: [tokens]."""
    config = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, **options)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]


def tokens_per_second(model: Qwen3MoeForCausalLM, ids: Tensor, tokens: int) -> float:
    """Speed of greedy generation, the prompt included."""
    generate(model, ids, min(tokens, 8), do_sample=False)  # Compiles, fills caches.
    start = time.perf_counter()
    generate(model, ids, tokens, do_sample=False).cpu()  # The copy waits for the device.
    return tokens / (time.perf_counter() - start)


def main() -> int:
    """Runs the example; the exit status."""
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # So small a model gains nothing from threads, and on a busy machine they would wait for each other.
    torch.set_num_threads(1)
    integration.register()
    folder = trained_weights(args.cache, args.device, args.seconds)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=args.dtype, experts_implementation="moe_ops")
    model.to(args.device).eval()
    print(f"model: {model.num_parameters():,} parameters, {MODEL['num_experts']} experts, {args.dtype}, {args.device}")

    prompt = encode(args.prompt).to(args.device)[None]
    torch.manual_seed(0)
    written = generate(model, prompt, args.tokens, do_sample=True, temperature=0.5)
    print(
        f"prompt: {args.prompt!r}\ngenerated through moe_ops:\n{'-' * 80}\n{args.prompt}{decode(written)}\n{'-' * 80}"
    )

    text = encode(corpus()[: CONTEXT * 4])[:CONTEXT].to(args.device)[None]
    good = agrees(model, text)
    print_plans(model, text)
    print(f"generation, {args.tokens} tokens, one at a time:")
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        print(f"  {implementation:12} {tokens_per_second(model, prompt, args.tokens):8.1f} tokens/s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
