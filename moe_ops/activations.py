"""The activations the op knows: one table, read by the argument checks, the reference, the backends and the kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """What the checks and the kernels need to know about one activation.

    Attributes:
        name: the value of the op's `activation` argument.
        gated: True if the up projection yields gate and up (`w1` has 2 * I rows), False if it yields I rows.
        default_alpha: the sigmoid's slope where the caller gives none; None if the activation has no such slope.
        default_limit: the clamp where the caller gives none; None if there is no clamp by default.
        takes_limit: True if `activation_limit` may be given.
    """

    name: str
    gated: bool
    default_alpha: float | None = None
    default_limit: float | None = None
    takes_limit: bool = False


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("silu", gated=True, takes_limit=True),
        Activation("gelu", gated=True),
        Activation("gelu_tanh", gated=True),
        Activation("swigluoai", gated=True, default_alpha=1.702, default_limit=7.0, takes_limit=True),
        Activation("silu_no_gate", gated=False),
        Activation("gelu_no_gate", gated=False),
        Activation("relu2_no_gate", gated=False),
    )
}
