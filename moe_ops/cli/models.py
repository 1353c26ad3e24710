"""Models by name or by a checkpoint's config.json: the sizes of their experts, as a rank of a deployment has them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ops.cli.calls import MAX_SIZE, Sizes
from moe_ops.tuning.files import ConfigError, is_there, read_json


@dataclass(frozen=True)
class Model:
    """The experts of a model.

    Attributes:
        experts: E.
        top_k: routes per token.
        hidden: H.
        intermediate: I of an expert.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def sizes(self, tp: int = 1, ep: int = 1) -> Sizes:
        """(E, top_k, H, I) of one rank.

        Args:
            tp: ranks that share every expert: each has I / tp of its columns.
            ep: ranks that share the experts: each has E / ep, and of a token's routes top_k / ep on average, at least
                one, as after an all-to-all.

        Returns:
            The rank's sizes.

        Raises:
            ValueError: the experts cannot be divided so.
        """
        if self.intermediate % tp:
            raise ValueError(f"--tp {tp} does not divide I = {self.intermediate}")
        if self.experts % ep:
            raise ValueError(f"--ep {ep} does not divide E = {self.experts}")
        experts = self.experts // ep
        return experts, min(experts, max(1, round(self.top_k / ep))), self.hidden, self.intermediate // tp


@dataclass(frozen=True)
class Deployment:
    """How a model is commonly served on GPUs of 80 GB: what its package's tables are for.

    Attributes:
        model: one of `MODELS`.
        tp: ranks that share every expert.
        ep: ranks that share the experts.
        formats: of its checkpoints: "none" or of `moe_ops.cli.formats.FORMATS`.
    """

    model: str
    tp: int = 1
    ep: int = 1
    formats: tuple[str, ...] = ("none",)

    @property
    def name(self) -> str:
        """As `--model` takes it: "deepseek-v3:tp8"."""
        ranks = "".join(f"{kind}{n}" for kind, n in (("tp", self.tp), ("ep", self.ep)) if n > 1)
        return f"{self.model}:{ranks}" if ranks else self.model


# Of the published config.json of each, at huggingface.co.
MODELS = {
    "mixtral-8x7b": Model(8, 2, 4096, 14336),  # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x22b": Model(8, 2, 6144, 16384),  # mistralai/Mixtral-8x22B-v0.1
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),  # Qwen/Qwen3-30B-A3B
    "qwen3-235b-a22b": Model(128, 8, 4096, 1536),  # Qwen/Qwen3-235B-A22B
    "qwen3-next-80b-a3b": Model(512, 10, 2048, 512),  # Qwen/Qwen3-Next-80B-A3B-Instruct
    "deepseek-v3": Model(256, 8, 7168, 2048),  # deepseek-ai/DeepSeek-V3
    "kimi-k2": Model(384, 8, 7168, 2048),  # moonshotai/Kimi-K2-Instruct
    "glm-4.5": Model(160, 8, 5120, 1536),  # zai-org/GLM-4.5
    "glm-4.5-air": Model(128, 8, 4096, 1408),  # zai-org/GLM-4.5-Air
    "gpt-oss-20b": Model(32, 4, 2880, 2880),  # openai/gpt-oss-20b
    "gpt-oss-120b": Model(128, 4, 2880, 2880),  # openai/gpt-oss-120b
    "llama-4-scout": Model(16, 1, 5120, 8192),  # meta-llama/Llama-4-Scout-17B-16E
    "llama-4-maverick": Model(128, 1, 5120, 8192),  # meta-llama/Llama-4-Maverick-17B-128E
    "olmoe-1b-7b": Model(64, 8, 2048, 1024),  # allenai/OLMoE-1B-7B-0924
    "granite-3.1-1b-a400m": Model(32, 8, 1024, 512),  # ibm-granite/granite-3.1-1b-a400m-base
    "granite-3.1-3b-a800m": Model(40, 8, 1536, 512),  # ibm-granite/granite-3.1-3b-a800m-base
    "gemma-4-26b-a4b": Model(128, 8, 2816, 704),  # google/gemma-4-26B-A4B
    "minimax-m2": Model(256, 8, 3072, 1536),  # MiniMaxAI/MiniMax-M2
    "phi-3.5-moe": Model(16, 2, 4096, 6400),  # microsoft/Phi-3.5-MoE-instruct
    "hunyuan-a13b": Model(64, 8, 4096, 3072),  # tencent/Hunyuan-A13B-Instruct
    "ernie-4.5-21b-a3b": Model(64, 6, 2560, 1536),  # baidu/ERNIE-4.5-21B-A3B-PT
    "dbrx": Model(16, 4, 6144, 10752),  # databricks/dbrx-base
}

COMMON = (
    Deployment("mixtral-8x7b", formats=("none", "fp8_tensor")),
    Deployment("mixtral-8x7b", tp=2),
    Deployment("qwen3-30b-a3b", formats=("none", "fp8_block")),
    Deployment("qwen3-235b-a22b", tp=4, formats=("none", "fp8_block")),
    Deployment("qwen3-235b-a22b", tp=8),
    Deployment("qwen3-next-80b-a3b", tp=2, formats=("none", "fp8_block")),
    Deployment("qwen3-next-80b-a3b", tp=4),
    Deployment("deepseek-v3", tp=8, formats=("none", "fp8_block")),
    Deployment("deepseek-v3", ep=8, formats=("none", "fp8_block")),
    Deployment("kimi-k2", tp=8, formats=("none", "fp8_block")),
    Deployment("glm-4.5", tp=8, formats=("none", "fp8_channel")),
    Deployment("gpt-oss-20b", formats=("none", "mxfp4")),
    Deployment("gpt-oss-120b", formats=("none", "mxfp4")),
    Deployment("llama-4-scout", tp=4, formats=("none", "fp8_channel")),
    Deployment("llama-4-maverick", tp=8, formats=("none", "fp8_channel")),
    Deployment("olmoe-1b-7b"),
    Deployment("granite-3.1-1b-a400m"),
    Deployment("granite-3.1-3b-a800m"),
    Deployment("gemma-4-26b-a4b"),
)

# Names of the same size in Hugging Face configurations, the more special first.
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_HIDDEN = ("hidden_size", "d_model")
_INTERMEDIATE = ("moe_intermediate_size", "expert_intermediate_size", "ffn_hidden_size", "intermediate_size")


_RANKS = re.compile(r"(.+?)(?::(?=.)(?:tp([1-9]\d{0,3}))?(?:ep([1-9]\d{0,3}))?)?", re.DOTALL)


def find_sizes(name: str, tp: int = 1, ep: int = 1) -> tuple[str, Sizes]:
    """(name, sizes of one rank) of a model.

    Args:
        name: as `find_model` takes it; ":tp8", ":ep8" or ":tp2ep4" after it stands above `tp` and `ep`.
        tp: ranks that share every expert.
        ep: ranks that share the experts.

    Returns:
        Its short name, with the ranks where there are several ("deepseek-v3-tp8"), and (E, top_k, H, I).

    Raises:
        ValueError: there is none, or it cannot be divided so.
    """
    base, own_tp, own_ep = _RANKS.fullmatch(name).groups() if name else ("", None, None)
    if own_tp or own_ep:
        tp, ep = int(own_tp or 1), int(own_ep or 1)
    short, model = find_model(base)
    sizes = model.sizes(tp, ep)
    return short + (f"-tp{tp}" if tp > 1 else "") + (f"-ep{ep}" if ep > 1 else ""), sizes


def find_model(name: str) -> tuple[str, Model]:
    """A model by its name, or by a checkpoint's config.json or the folder it lies in. Nothing is downloaded.

    Args:
        name: one of `MODELS`, in any case and with or without its owner ("Qwen/Qwen3-30B-A3B"), or a path.

    Returns:
        (short name, model).

    Raises:
        ValueError: there is none; the message says what was expected.
    """
    path = Path(name)
    if name and is_there(path):
        file = path / "config.json" if path.is_dir() else path
        return (file.parent.name or "model") if file.name == "config.json" else file.stem, read_config(file)
    short = name.lower().rsplit("/", 1)[-1]
    matches = [known for known in MODELS if short == known or short.startswith(f"{known}-")]
    if matches:
        best = max(matches, key=len)
        return best, MODELS[best]
    raise ValueError(f"{name!r} is neither a config.json nor one of {', '.join(MODELS)}")


def read_config(file: Path) -> Model:
    """The experts of a Hugging Face config.json.

    Raises:
        ValueError: the file is broken, or of a model without experts; the message names the key.
    """
    value = read_json(file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not the configuration of a model: it is no object")
    inner = value.get("text_config")
    if isinstance(inner, dict) and not any(key in value for key in _EXPERTS):
        value = inner
    experts, top_k, hidden, intermediate = (
        _first(file, value, names) for names in (_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE)
    )
    if top_k > experts:
        raise ConfigError(f"{file} sends a token to {top_k} of {experts} experts")
    return Model(experts, top_k, hidden, intermediate)


def _first(file: Path, value: dict, names: Sequence[str]) -> int:
    for name in names:
        if value.get(name) is not None:
            size = value[name]
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise ConfigError(f"{file}: {name} is {str(size)[:40]}, expected an integer from 1 to {MAX_SIZE}")
            return size
    raise ConfigError(f"{file} has none of {', '.join(names)}: it is not of a model with experts that is known")
