"""The rule of correctness: scale-free, against a float64 oracle, as tight as the declared roundings allow.

Errors are normalised by max(rms(reference), |reference|), so that neither a small output scale nor cancelled elements
blind the rule: e = |actual - reference| / max(rms(reference), |reference|). A result is right when, against an emulator
that has the declared roundings and nothing else,

    rms(e) <= 1.15 * rms(e of the emulator)    and    max(e) <= 2 * max(e of the emulator),

each widened by the sampling error of few elements, 1 + 2 / sqrt(n), and rms(reference) > 0. The normalisation is that
of the tests of OpenAI's triton_kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.reference import fused_moe_reference
from moe_ops.testing.emulator import emulate

_RMS_FACTOR = 1.15
_MAX_FACTOR = 2.0


@dataclass(frozen=True)
class Errors:
    """Normalised errors of a result.

    Attributes:
        rms: root mean square.
        max: largest.
    """

    rms: float
    max: float


def errors(actual: Tensor, reference: Tensor) -> Errors:
    """Normalised errors of `actual` against `reference`, in float64; NaN and infinity where they differ count as inf.

    Args:
        actual: the result, any shape and dtype.
        reference: what it should be, shaped as `actual`, float64 or float32.

    Returns:
        rms and max of |actual - reference| / max(rms(reference), |reference|).

    Raises:
        AssertionError: the shapes differ, or the reference is all zeros, which everything would be compared well with.

    Example:
        >>> import torch
        >>> errors(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).max
        0.5
    """
    if actual.shape != reference.shape:
        raise AssertionError(f"the result has shape {list(actual.shape)}, the reference {list(reference.shape)}")
    actual, reference = actual.double(), reference.double()
    finite = reference[reference.isfinite()]
    scale = finite.square().mean().sqrt()
    if not scale > 0:
        raise AssertionError("rms(reference) is 0: the comparison would be blind")
    error = (actual - reference).abs() / reference.abs().clamp(min=scale)
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    error = torch.where(same, 0.0, error).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return Errors(error.square().mean().sqrt().item(), error.max().item())


def assert_correct(
    actual: Tensor, args: Arguments, *, round_up_projection: bool = False, reference: Tensor | None = None
) -> Errors:
    """Holds a result of the op against the rule of correctness.

    Args:
        actual: the result.
        args: the call it is the result of.
        round_up_projection: allow the CPU path's extra rounding; see `emulate`.
        reference: the float64 result, shaped as `actual`, where the caller has it already.

    Returns:
        The result's errors.

    Raises:
        AssertionError: a bound does not hold, the dtype or shape is wrong, or the reference is all zeros.

    Example:
        >>> import torch
        >>> from moe_ops.testing import assert_correct, random_inputs
        >>> args = random_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2)
        >>> out = torch.ops.moe_ops.fused_moe_tma(*args.tensors().values())
        >>> assert_correct(out, args).max < 1e-4
        True
    """
    if reference is None:
        reference = fused_moe_reference(args)
    emulated = emulate(args, round_up_projection=round_up_projection)
    if actual.dtype != emulated.dtype:
        raise AssertionError(f"the result has dtype {actual.dtype}, expected {emulated.dtype}")
    got, allowed = errors(actual, reference), errors(emulated, reference)
    sampling = 1 + 2 / max(1, actual.numel()) ** 0.5
    for name, factor in (("rms", _RMS_FACTOR), ("max", _MAX_FACTOR)):
        value, bound = getattr(got, name), factor * sampling * getattr(allowed, name)
        if not value <= bound:
            raise AssertionError(
                f"{name} error {value:.3e} is above {bound:.3e} ({factor} times the emulator's "
                f"{getattr(allowed, name):.3e}, n = {actual.numel()})"
            )
    return got


def assert_exact(actual: Tensor, args: Arguments) -> None:
    """Holds a result on `exact_inputs` against the reference, bit for bit.

    Args:
        actual: the result.
        args: the call; from `exact_inputs`, so that every intermediate value is exactly representable.

    Raises:
        AssertionError: an element differs, or the reference is all zeros.

    Example:
        >>> import torch
        >>> from moe_ops.testing import assert_exact, exact_inputs
        >>> args = exact_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2)
        >>> assert_exact(torch.ops.moe_ops.fused_moe_tma(*args.tensors().values()), args)
    """
    expected = fused_moe_reference(args).to(actual.dtype)
    if not (expected != 0).any():
        raise AssertionError("the reference is all zeros: the comparison would be blind")
    wrong = (actual != expected).nonzero()
    if wrong.numel():
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{wrong.shape[0]} of {actual.numel()} elements differ; the first, at {first}, is "
            f"{actual[first].item()}, expected {expected[first].item()}"
        )
