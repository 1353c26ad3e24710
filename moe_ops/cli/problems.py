"""Calls that nobody makes: the `Problem` of a model's shape on tensors without memory, for plans without a GPU."""

import torch

from moe_ops.arguments import Arguments
from moe_ops.cli.calls import Sizes
from moe_ops.cli.formats import Format
from moe_ops.problem import Problem, make_problem
from moe_ops.quantization.scheme import MX_GROUP, WEIGHT_DTYPES


def describe_call(
    sizes: Sizes, tokens: int, dtype: torch.dtype, form: Format | None = None, path: str = "auto", **options
) -> Problem:
    """The `Problem` of a call.

    Args:
        sizes: (E, top_k, H, I).
        tokens: M.
        dtype: the compute dtype.
        form: the format of the weights; None for weights in `dtype`.
        path: as the op's argument.
        **options: other options of the op.

    Returns:
        The call's description, with weights as aligned as can be.

    Raises:
        ValueError: the op would refuse the call.
    """
    return make_problem(describe_arguments(sizes, tokens, dtype, form, path, **options), traced=True)


def describe_arguments(
    sizes: Sizes, tokens: int, dtype: torch.dtype, form: Format | None = None, path: str = "auto", **options
) -> Arguments:
    """The arguments of a call, on tensors without memory; see `describe_call`."""
    experts, top_k, hidden, intermediate = sizes

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments: dict[str, object] = {}
    for which, rows, columns in (("w1", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
        if form is None:
            arguments[which] = empty(experts, rows, columns)
            continue
        packed = form.quantization in ("int4_w4a16", "mxfp4_w4a16")
        stored = columns // 2 if packed else columns
        arguments[which] = empty(experts, rows, stored, dtype=WEIGHT_DTYPES[form.quantization][0])
        scale_dtype = torch.uint8 if form.quantization == "mxfp4_w4a16" else torch.float32
        arguments[f"{which}_scale"] = empty(experts, *_scales(form, rows, columns), dtype=scale_dtype)
    if form is not None:
        arguments |= {"quantization": form.quantization, "block_shape": form.block_shape}
        if form.static:
            arguments |= {name: empty(1, dtype=torch.float32) for name in ("a1_scale", "a2_scale")}
    ids = empty(tokens, top_k, dtype=torch.int32)
    return Arguments(
        empty(tokens, hidden), topk_weights=empty(tokens, top_k, dtype=torch.float32), topk_ids=ids, path=path,
        **arguments, **options,
    )  # fmt: skip


def _scales(form: Format, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of an expert's scales."""
    if form.quantization == "mxfp4_w4a16":
        return rows, -(-columns // MX_GROUP)
    if form.block_shape is None:
        return () if form.granularity == "tensor" else (rows,)
    block_rows, block_columns = form.block_shape
    return -(-rows // block_rows) if block_rows else rows, -(-columns // block_columns)
