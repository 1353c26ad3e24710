"""Calls as text, whatever their number of tokens: what tables are found by. Needs no Triton."""

from dataclasses import MISSING, fields

import torch

from moe_ops.arguments import OPTION_ARGUMENTS, REQUIRED_TENSORS, TENSOR_ARGUMENTS, Arguments

# Arguments whose first size is the number of tokens; a1_scale's only where it has a scale a row.
_PER_TOKEN = ("hidden_states", "topk_weights", "topk_ids", "a1_scale")
_DEFAULTS = {field.name: field.default for field in fields(Arguments) if field.default is not MISSING}
# What has no influence on the launches: all that is compiled is deterministic, and on the TMA path.
_LEFT_OUT = ("deterministic", "path")
_OPTIONS = tuple(name for name in OPTION_ARGUMENTS if name not in _LEFT_OUT)


def call_text(args: Arguments) -> str:
    """A call without its number of tokens, as a table and `python -m moe_ops aot --shapes` have it.

    Every tensor is there as dtype[sizes], and every option that has not its default::

        hidden_states=bfloat16[M,64] w1=bfloat16[8,64,64] ... topk_ids=int32[M,2] activation=gelu

    The C++ library makes the same text (csrc_stubs/launch_table.cpp).
    """
    words = [
        f"{name}={dtype_text(tensor.dtype)}[{','.join(map(str, symbolic_shape(name, tuple(tensor.shape), 'M')))}]"
        for name, tensor in args.tensors().items()
    ]
    for name in _OPTIONS:
        value = getattr(args, name)
        # The one option whose default is another argument's.
        if value != _DEFAULTS[name] and not (name == "out_dtype" and value == args.hidden_states.dtype):
            words.append(f"{name}={_value_text(value)}")
    return " ".join(words)


def parse_call(text: str, num_tokens: int) -> Arguments:
    """The call of a text, with contiguous tensors that have no memory.

    Raises:
        ValueError: the text is none of a call; the message names the word.
    """
    values = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name in TENSOR_ARGUMENTS:
            values[name] = _parse_tensor(word, value, num_tokens)
        elif name in _OPTIONS and value:
            values[name] = _parse_option(word, name, value)
        else:
            raise ValueError(f"{word!r} is no argument, expected NAME=VALUE, with NAME one of the op's arguments")
    missing = [name for name in REQUIRED_TENSORS if name not in values]
    if missing:
        raise ValueError(f"{text!r} lacks {', '.join(missing)}; expected e.g. {missing[0]}=bfloat16[M,2048]")
    return Arguments(**values)


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _value_text(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:.17g}"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    return value if isinstance(value, str) else f"[{','.join(map(str, value))}]"


def _parse_tensor(word: str, text: str, num_tokens: int) -> torch.Tensor:
    name, _, sizes = text.removesuffix("]").partition("[")
    dtype = getattr(torch, name, None)
    try:
        shape = [num_tokens if size == "M" else int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not isinstance(dtype, torch.dtype) or not shape or not text.endswith("]"):
        raise ValueError(f"{word!r} is no tensor, expected NAME=DTYPE[SIZE,...], e.g. w2=bfloat16[128,2048,768]")
    return torch.empty(shape, dtype=dtype, device="meta")


def _parse_option(word: str, name: str, text: str):
    default = _DEFAULTS[name]
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        if name == "out_dtype":
            return getattr(torch, text)
        if name == "block_shape":
            return [int(size) for size in text.strip("[]").split(",")]
        return text if isinstance(default, str) else float(text)
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{word!r} has no value of {name}") from None


def symbolic_shape(name: str, shape: tuple[int, ...], tokens: object) -> tuple:
    """A shape with the number of tokens replaced."""
    return (tokens, *shape[1:]) if name in _PER_TOKEN and len(shape) == 2 else shape
