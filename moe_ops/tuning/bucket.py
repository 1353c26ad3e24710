"""What tuned tiles are filed under: the sizes of a call but for the number of tokens, its dtype, format and path."""

import re
from dataclasses import dataclass

import torch

from moe_ops.problem import Problem
from moe_ops.quantization.scheme import GROUP, MX_GROUP, Scheme

DTYPES = ("bfloat16", "float16")
PATHS = ("tma", "classic")
# As `python -m moe_ops bench --format` names them.
FORMATS = (
    "none", "fp8_tensor", "fp8_tensor_static", "fp8_channel", "fp8_block", "int8_channel", "int8_block",
    "int8_weights", "int4", "int4_g64", "int4_g32", "mxfp4",
)  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Calls that share a table of tuned tiles.

    Attributes:
        experts: E, the experts whose weights are here.
        hidden: H.
        intermediate: I.
        top_k: routes per token.
        dtype: "bfloat16" or "float16", the compute dtype.
        format: of the weights, one of `FORMATS`.
        path: "tma" or "classic".
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    dtype: str
    format: str
    path: str

    @property
    def file_name(self) -> str:
        """Of its table, inside the folder of a device."""
        sizes = f"E={self.experts},H={self.hidden},I={self.intermediate},top_k={self.top_k}"
        return f"{sizes},dtype={self.dtype},format={self.format},path={self.path}.json"

    @property
    def tune_command(self) -> str:
        """What makes its table."""
        sizes = f"{self.experts},{self.top_k},{self.hidden},{self.intermediate}"
        form = "" if self.format == "none" else f" --format {self.format}"
        path = "" if self.path == "tma" else f" --path {self.path}"
        return f"python -m moe_ops tune --shape {sizes} --dtype {self.dtype}{form}{path}"


def bucket_of(problem: Problem, path: str) -> Bucket | None:
    """The bucket of a call that takes a path.

    None for calls that no table is for: fp32, e5m2, N-major weights, activations without a gate, zero points.
    """
    form = format_name(problem.scheme)
    dtype = str(problem.dtype).removeprefix("torch.")
    k_major = problem.w1_strides[2] == 1 == problem.w2_strides[2]
    ordinary = k_major and problem.activation.gated and problem.weight_dtype != torch.float8_e5m2
    if form is None or not ordinary or dtype not in DTYPES or path not in PATHS:
        return None
    return Bucket(problem.num_experts, problem.hidden_size, problem.intermediate_size, problem.top_k, dtype, form, path)


def format_name(scheme: Scheme) -> str | None:
    """The format of a scheme, one of `FORMATS`; None for one that is not among them."""
    if scheme.zero_points:
        return None
    columns = scheme.scale_columns
    if scheme.name == "fp8_w8a8" and not columns:
        static = "_static" if scheme.scale_rows == 0 and scheme.act in ("tensor", "expert") else ""
        return f"fp8_{'channel' if scheme.scale_rows else 'tensor'}{static}"
    return {
        ("none", 0): "none",
        ("fp8_w8a8", GROUP): "fp8_block",
        ("int8_w8a8", 0): "int8_channel",
        ("int8_w8a8", GROUP): "int8_block",
        ("int8_w8a16", 0): "int8_weights",
        ("int4_w4a16", 128): "int4",
        ("int4_w4a16", 64): "int4_g64",
        ("int4_w4a16", 32): "int4_g32",
        ("mxfp4_w4a16", MX_GROUP): "mxfp4",
    }.get((scheme.name, columns))


def device_folder(name: str) -> str:
    """The folder of a device's tables: its name in letters, digits, "." and "-", joined by "_"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "unknown"


def architecture_folder(capability: tuple[int, int]) -> str:
    """The folder of tables for every device of an architecture that has none of its own."""
    return f"sm_{capability[0]}{capability[1]}"
