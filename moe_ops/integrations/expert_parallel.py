"""Hugging Face transformers: `ep_implementation="moe_ops"` runs a model's experts across ranks by `ExpertParallel`.

transformers, where it has an `EPImplementationInterface` (5.24 does), asks one of that name for the experts' output of
the tokens that a rank holds. This one sends tokens, each to a rank once, and runs the op on the experts that are here.
Its own implementations work with the op too (`experts_implementation="moe_ops"`): they mark experts of other ranks by
an id that is no expert's, which contributes exactly 0.
"""

import functools

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_ops.env import LOGGER
from moe_ops.integrations.translate import NAME, biases_of, name_of, options_of, weights_of

_FALLBACK = "all_to_all"


def register() -> bool:
    """Registers the implementation, where transformers has the interface; says whether it has."""
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        return False
    EPImplementationInterface.register(NAME, _implementation())
    return True


@functools.cache
def _implementation() -> type:
    """The class, made at its first use: its base is transformers'."""
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

    class MoeOpsEP(EPImplementation):
        """The op across ranks: for ranks that hold batches of their own, and for those that share one.

        Ranks that share a batch take slices of it, as transformers' own all-to-all does, and gather the results.
        """

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            from moe_ops.distributed import ExpertParallel

            self.experts = experts
            self.ep = ExpertParallel(ep_mesh, self.num_local_experts * ep_mesh.size())
            self.fallback = EPImplementationInterface()[_FALLBACK](experts, ep_mesh, tp_mesh)
            self.told = False

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            options = options_of(self.experts, hidden_states.device)
            if isinstance(options, str):
                self._tell(options)
                return self.fallback(hidden_states, top_k_index, top_k_weights)
            mine = hidden_states, top_k_index, top_k_weights
            shared, ranks = hidden_states.shape[0], self.tp_mesh.size()
            share = -(-shared // ranks)
            if ranks > 1:
                rows = slice(self.tp_mesh.get_local_rank() * share, (self.tp_mesh.get_local_rank() + 1) * share)
                mine = tuple(tensor[rows] for tensor in mine)
            x, ids, weights = mine
            biases = dict(zip(("w1_bias", "w2_bias"), biases_of(self.experts), strict=True))
            out = self.ep.fused_moe(x, *weights_of(self.experts), weights, ids, **biases, **options)
            return out if ranks == 1 else self._gather(out, shared, share)

        def _gather(self, out: Tensor, shared: int, share: int) -> Tensor:
            """The slices of all ranks that share a batch; the last ones may be short."""
            from moe_ops.distributed.groups import resolve_group

            padded = out.new_zeros((share, out.shape[1]))
            padded[: out.shape[0]] = out
            group = resolve_group(self.tp_mesh, out.device)
            return group.all_gather(padded, "the all-gather of the slices")[:shared]

        def _tell(self, reason: str) -> None:
            if not self.told:
                self.told = True
                name = name_of(type(self.experts))
                LOGGER.warning("%s runs transformers' %r instead of the op across ranks: %s", name, _FALLBACK, reason)

    return MoeOpsEP
