"""The check of every result before it is timed: against ours, and in a quantised call against the oracle as well."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops.arguments import Arguments

# In epsilons of the dtype: more than two right implementations with roundings of their own differ by (normalised rms).
_TOLERANCE = 2
# In a quantised call: tokens that the oracle computes too, and over the emulator's error (normalised rms) that of a
# result (but for the sampling error of few elements), and the difference of two results.
_SAMPLE = 4
_OF_EMULATED, _APART = 1.25, 2.5


@dataclass(frozen=True)
class Sample:
    """Some tokens of a call, by the oracle.

    Attributes:
        tokens: which.
        reference: their rows of the result, in float64.
        emulated: normalised rms error of a result that has the op's declared roundings and no others.
    """

    tokens: Tensor
    reference: Tensor
    emulated: float


@dataclass(frozen=True)
class Check:
    """What a cell's results are held against.

    Attributes:
        expected: our result.
        sample: of a quantised call; None for an unquantised one, whose peers round where we do.
    """

    expected: Tensor
    sample: Sample | None = None

    def difference(self, result: Tensor) -> float:
        """rms of the normalised difference from our result.

        Raises:
            ValueError: it is more than roundings.
        """
        from moe_ops.testing import errors

        difference = errors(result, self.expected.double()).rms
        bound = _TOLERANCE * torch.finfo(self.expected.dtype).eps
        if self.sample is not None:
            bound = max(bound, _APART * self.sample.emulated)
        if not difference <= bound:
            raise ValueError(f"wrong result: it differs from ours by {difference:.1e} (rms), roundings by {bound:.1e}")
        return difference

    def oracle(self, result: Tensor) -> float | None:
        """rms of the normalised error of the sample over the emulator's; None without a sample.

        Raises:
            ValueError: it is more than roundings.
        """
        from moe_ops.testing import errors

        if self.sample is None:
            return None
        ratio = errors(result[self.sample.tokens], self.sample.reference).rms / self.sample.emulated
        bound = _OF_EMULATED * (1 + 2 / self.sample.reference.numel() ** 0.5)
        if not ratio <= bound:
            raise ValueError(
                f"wrong result: its error is {ratio:.2f} times the emulator's (rms), {bound:.2f} are allowed"
            )
        return ratio


def prepare_check(args: Arguments, expected: Tensor) -> Check:
    """Readies the check of a call's results. Where the call is quantised, waits for the device."""
    if args.quantization == "none":
        return Check(expected)
    return Check(expected, _sample(args))


def _sample(args: Arguments) -> Sample:
    """Tokens from the first to the last one: each is a call of its own, whatever else is in the batch."""
    from dataclasses import replace

    from moe_ops.reference import fused_moe_reference
    from moe_ops.testing import emulate, errors

    num_tokens = args.hidden_states.shape[0]
    count = min(num_tokens, _SAMPLE)
    last = torch.arange(count, device=args.hidden_states.device) * (num_tokens - 1)
    tokens = last // max(1, count - 1)
    rows = {name: getattr(args, name)[tokens] for name in ("hidden_states", "topk_weights", "topk_ids")}
    few = replace(args, **rows)
    reference = fused_moe_reference(few)
    return Sample(tokens, reference, errors(emulate(few), reference).rms)
