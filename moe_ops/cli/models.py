"""Models by name or by a checkpoint's config.json: the sizes of their experts, as a rank of a deployment has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ops.cli.calls import Sizes
from moe_ops.tuning.files import ConfigError, is_there, read_json

_MAX_SIZE = 1 << 24


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


# Of the published config.json of each.
MODELS = {
    "mixtral-8x7b": Model(8, 2, 4096, 14336),
    "mixtral-8x22b": Model(8, 2, 6144, 16384),
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),
    "qwen3-235b-a22b": Model(128, 8, 4096, 1536),
    "qwen3-next-80b-a3b": Model(512, 10, 2048, 512),
    "deepseek-v3": Model(256, 8, 7168, 2048),
    "kimi-k2": Model(384, 8, 7168, 2048),
    "glm-4.5": Model(160, 8, 5120, 1536),
    "glm-4.5-air": Model(128, 8, 4096, 1408),
    "gpt-oss-20b": Model(32, 4, 2880, 2880),
    "gpt-oss-120b": Model(128, 4, 2880, 2880),
    "llama-4-scout": Model(16, 1, 5120, 8192),
    "llama-4-maverick": Model(128, 1, 5120, 8192),
    "olmoe-1b-7b": Model(64, 8, 2048, 1024),
    "granite-3.1-1b-a400m": Model(32, 8, 1024, 512),
    "granite-3.1-3b-a800m": Model(40, 8, 1536, 512),
    "gemma-4-26b-a4b": Model(128, 8, 2816, 704),
}

# Names of the same size in Hugging Face configurations, the more special first.
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
_HIDDEN = ("hidden_size", "d_model")
_INTERMEDIATE = ("moe_intermediate_size", "expert_intermediate_size", "ffn_hidden_size", "intermediate_size")


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
    if is_there(path):
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
            if type(size) is not int or not 1 <= size <= _MAX_SIZE:
                raise ConfigError(f"{file}: {name} is {str(size)[:40]}, expected an integer from 1 to {_MAX_SIZE}")
            return size
    raise ConfigError(f"{file} has none of {', '.join(names)}: it is not of a model with experts that is known")
