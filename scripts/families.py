"""Writes docs/models.md: what every model family of the installed transformers gets from the op, and why.

    python scripts/families.py              all families
    python scripts/families.py qwen3_moe    these only, and nothing is written

A family is a folder of transformers.models whose modeling file uses the experts interface. Of each a tiny random model
is built from its own configuration, in float32 on the CPU, and run with transformers' eager experts and with the op's.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import moe_ops.integrations.transformers as integration  # noqa: E402
from moe_ops.integrations.translate import options_of  # noqa: E402

TOLERANCE = 1e-4
_MOST_PARAMETERS = 5_000_000
_EXPERTS, _TOP_K, _LAYERS, _HIDDEN, _SIZE, _HEAD = 8, 3, 2, 32, 16, 8
# Fields of configurations and the value that makes a model tiny; what a configuration does not have is left out.
_TINY = (
    (64, "vocab_size unpadded_vocab_size router_hidden_size"),
    (_HIDDEN, "hidden_size moe_hidden_size dense_intermediate_size"),
    (_SIZE, "intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (_SIZE, "moe_shared_expert_intermediate_size shared_experts_intermediate_size index_head_dim o_lora_rank"),
    (_SIZE, "q_lora_rank kv_lora_rank mamba_head_dim hc_lowrank"),
    (_LAYERS, "num_hidden_layers"),
    (4, "num_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads"),
    (4, "mamba_n_heads mamba_num_heads sliding_window sliding_window_size rel_extent"),
    (2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_group n_groups mamba_d_conv o_groups"),
    (_HEAD, "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_v_head_dim"),
    (_HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size mamba_dt_rank"),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (_TOP_K, "num_experts_per_tok top_k_experts moe_topk moe_k index_topk num_experts_per_token"),
    (1, "topk_group n_shared_experts num_shared_experts decoder_sparse_step index_kpool"),
    (0, "first_k_dense_replace num_dense_layers moe_layer_start_index num_nextn_predict_layers num_mtp_layers"),
    (0, "pad_token_id bos_token_id"),
    (None, "mlp_layer_types layer_types eos_token_id"),
    (True, "enable_moe_block"),
    (512, "max_position_embeddings"),
    (0.2, "initializer_range"),
)
_TINY_VALUES = {name: value for value, names in _TINY for name in names.split()}


def _rope(sections: list[int], **options: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **options}


# What one family needs besides, or instead.
_SPECIAL: dict[str, dict[str, object]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [_SIZE, _SIZE], "rope_parameters": _rope([1, 1, 2])},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"hidden_size_per_layer_input": _HEAD, "vocab_size_per_layer_input": 64, "global_head_dim": _HEAD},
    "glm4v_moe": {"rope_parameters": _rope([1, 1, 0], partial_rotary_factor=0.5)},
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "hy_v4_vl": {"rope_parameters": _rope([2, 1, 1])},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["moe", "attention"]},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "full_attention"],
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "ple_embed_dim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}
# The model that generates text first, then the others that take tokens.
_KINDS = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model", "")


PAGE = """# Model families

Written by `python scripts/families.py`, with transformers {version}.

Of the {families} families that have transformers' experts interface, `experts_implementation="moe_ops"` runs the
experts of {fused} through the op; {fallback} fall back to transformers' `grouped_mm`, and the log says why, once;
{not_built} could not be built. Families without the interface do not take the option.

Of each family a tiny random model was made from its own configuration, in float32 on the CPU. *Fused*: every experts
module that ran was one call of the op with these options, and logits (of the text models of multi-modal families: last
hidden states) are within {tolerance} of those with transformers' eager experts. *Fallback*: they are `grouped_mm`'s.

Experts of FP8 checkpoints (`FP8Experts`, whatever the family) run through the op with dynamic activation scales and a
`weight_scale_inv` for each [128, 128] of e4m3fn weights, in float32 or e8m0, if their gate is the plain one, the
clamped one or swigluoai. Static scales, other blocks, fp4 weights and softcapped gates fall back; so do experts with
2 * I of at most 128, where gate and up have a scale each within one block of the op.

`moe_ops.nn.FusedExperts.from_hf(module)` makes a module of its own of what is fused here, and
`moe_ops.nn.convert_hf_state_dict` takes the weights of an MoE block, or its checkpoint, to `moe_ops.nn.MoELayer`.

*Router*: `moe_ops.integrations.transformers.fuse_routers(model)` lets those that are *fused* choose experts by
`topk_route` ({routers} families); with it logits were within the same bound. The others keep their own.

| family | model | experts | router | options of the op, or why not |
| --- | --- | --- | --- | --- |
{rows}
"""


@dataclasses.dataclass
class Verdict:
    """What a family got."""

    family: str
    model: str = ""
    result: str = "not built"  # or "fused", "fallback"
    router: str = "own"  # or "fused"
    why: str = ""


def families() -> list[str]:
    """Folders of transformers.models whose modeling file uses the experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if "@use_experts_implementation" in file.read_text()})


def tiny_config(cls: type, family: str, **options):
    """A configuration of a class with everything small, sub-configurations included."""
    names = set(getattr(cls, "__dataclass_fields__", ())) | set(inspect.signature(cls.__init__).parameters)
    values = {name: value for name, value in _TINY_VALUES.items() if name in names}
    if "kv_lora_rank" in names:  # Latent attention has as many keys as queries.
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= {name: value for name, value in _SPECIAL.get(family, {}).items() if name in names}
    return cls(**{**values, **options})


def model_classes(family: str) -> list[type]:
    """Classes of models of a family that may have experts, the ones that generate first."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, transformers.PreTrainedModel)
        and cls.__module__ == module.__name__
        and not cls.__name__.endswith("PreTrainedModel")
        and cls.config_class is not None
    ]

    def rank(cls: type) -> tuple[int, bool]:
        kind = next(i for i, ending in enumerate(_KINDS) if cls.__name__.endswith(ending))
        return kind, "Vision" in cls.__name__ or "Audio" in cls.__name__

    return sorted(classes, key=rank)


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers runs through its experts interface."""
    return [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "has_gate")]


def build(cls: type, family: str) -> nn.Module:
    """A tiny random model of a class, with experts, in evaluation mode.

    Raises:
        ValueError: it has no experts, or is too large nevertheless.
        Exception: whatever transformers raises.
    """
    config = tiny_config(cls.config_class, family)
    with torch.device("meta"):
        probe = cls._from_config(config)
    if not experts_of(probe):
        raise ValueError("no experts in it")
    size = sum(parameter.numel() for parameter in probe.parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with everything small that is known to be a size")
    torch.manual_seed(0)
    return cls._from_config(tiny_config(cls.config_class, family), experts_implementation="eager").eval()


@contextlib.contextmanager
def replaced_op(function: Callable[..., Tensor]) -> Iterator[None]:
    """The integration calls a function in place of the op."""
    original, integration.fused_moe = integration.fused_moe, function
    try:
        yield
    finally:
        integration.fused_moe = original


@torch.no_grad()
def outputs(model: nn.Module, implementation: str, tokens: int = 9) -> Tensor:
    """Logits, or last hidden states, of two sequences."""
    model.set_experts_implementation(implementation)
    torch.manual_seed(1)
    ids = torch.randint(1, 64, (2, tokens)).to(model.device)
    result = model(input_ids=ids, use_cache=False)
    return result.logits if getattr(result, "logits", None) is not None else result[0]


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest one, as a part of the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def judge(model: nn.Module, family: str) -> Verdict:
    """Runs a model both ways and says what happened.

    Raises:
        ArithmeticError: the results differ.
        RuntimeError: the op was not called, or what it returns does not matter.
    """
    verdict, calls, forwards, op = Verdict(family, type(model).__name__), [], [], integration.fused_moe

    def counted(*args, **kwargs) -> Tensor:
        calls.append(kwargs)
        return op(*args, **kwargs)

    experts = experts_of(model)
    hooks = [module.register_forward_pre_hook(lambda module, _: forwards.append(module)) for module in experts]
    with replaced_op(counted):
        got = outputs(model, integration.NAME)
    for hook in hooks:
        hook.remove()
    reasons = {options for module in experts if isinstance(options := options_of(module, got.device), str)}
    # What falls back is held to the same function of transformers: its rounding is that function's own.
    expected = outputs(model, integration.FALLBACK if reasons else "eager")
    results = {"": got}
    if integration.fuse_routers(model):
        verdict.router = "fused"
        results[" with fused routers"] = outputs(model, integration.NAME)
    for how, result in results.items():
        error = difference(result, expected)
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{type(model).__name__}: the results{how} differ by {error:.1e}")
    if reasons:
        verdict.result, verdict.why = "fallback", "; ".join(sorted(reasons))
        return verdict
    if not calls or len(calls) != len(forwards):
        raise RuntimeError(f"{len(calls)} calls of the op for {len(forwards)} of experts modules")
    with replaced_op(lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)):
        if not difference(outputs(model, integration.NAME), got) > 100 * TOLERANCE:
            raise RuntimeError("the experts do not change the result")
    verdict.result = "fused"
    verdict.why = ", ".join(f"{name}={value}" for name, value in calls[0].items())
    return verdict


def verdict_of(family: str, device: str = "cpu") -> tuple[Verdict, nn.Module | None]:
    """The verdict of the first model of a family that can be built and run on a device, and the model."""
    first = None
    for cls in model_classes(family):
        try:
            model = build(cls, family).to(device)
            return judge(model, family), model
        except ArithmeticError:
            raise
        except Exception as error:  # Whatever a model's own code raises is what the table says.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            if first is None or first.why.endswith("no experts in it"):
                first = Verdict(family, cls.__name__, why=f"{type(error).__name__}: {' '.join(lines)}")
    return first or Verdict(family, why="its modeling file has no model class"), None


def quiet() -> None:
    """No advice from transformers about tiny models."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    integration.LOGGER.setLevel("ERROR")


def page(verdicts: list[Verdict]) -> str:
    """The text of docs/models.md."""
    counts = {result: sum(v.result == result for v in verdicts) for result in ("fused", "fallback", "not built")}
    rows = [f"| `{v.family}` | `{v.model}` | {v.result} | {v.router} | {v.why.replace('|', ' ')} |" for v in verdicts]
    return PAGE.format(
        version=transformers.__version__, families=len(verdicts), fused=counts["fused"], fallback=counts["fallback"],
        not_built=counts["not built"], tolerance=TOLERANCE, rows="\n".join(rows),
        routers=sum(v.router == "fused" for v in verdicts),
    )  # fmt: skip


def main() -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="folders of transformers.models (default: all, to docs/models.md)")
    args = parser.parse_args()
    unknown = set(args.families) - set(families())
    if unknown:
        parser.error(f"no families with the experts interface: {', '.join(sorted(unknown))}")
    quiet()
    integration.register()
    verdicts = []
    for family in args.families or families():
        verdicts.append(verdict_of(family)[0])
        print(*dataclasses.astuple(verdicts[-1]), sep=" | ", flush=True)
    if not args.families:
        file = ROOT / "docs" / "models.md"
        file.write_text(page(verdicts))
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
