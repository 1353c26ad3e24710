"""What the op is compared with. A peer is prepared for a call, which may raise, and then called without arguments."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.cli.peers.grouped import grouped_mm

__all__ = ["PEERS", "Peer", "grouped_mm"]


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with, for unquantised calls with concatenated gated silu and ids in range.

    Attributes:
        adapter: our module of that name in this package, and what to call in it: (args, *arguments) -> () -> [M, H].
        modules: what has to import.
        arguments: the adapter's further arguments.
    """

    adapter: tuple[str, str]
    modules: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def obstacle(self) -> str | None:
        """Why it cannot run here, None if nothing is known against it. Imports it."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                return "not installed" if error.name == module.split(".")[0] else f"import of {module} fails: {error}"
            except Exception as error:  # whatever a foreign package does while it is imported
                return f"import of {module} fails: {type(error).__name__}: {error}"
        return None

    def prepare(self, args: Arguments) -> Callable[[], Tensor]:
        """Readies a call: what a model would do once (repacking weights, dtypes of ids) is done here, untimed."""
        module, function = self.adapter
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(args, *self.arguments)


_EXPERTS = "transformers.integrations.moe"

PEERS = {
    "grouped_mm": Peer(("grouped", "prepare")),
    "grouped_mm_compiled": Peer(("grouped", "prepare_compiled")),
    "hf_eager": Peer(("hf", "prepare"), (_EXPERTS,), ("eager",)),
    "hf_batched_mm": Peer(("hf", "prepare"), (_EXPERTS,), ("batched_mm",)),
    "hf_grouped_mm": Peer(("hf", "prepare"), (_EXPERTS,), ("grouped_mm",)),
    # These two fetch their kernels from the Hub.
    "hf_deepgemm": Peer(("hf", "prepare"), (_EXPERTS, "kernels"), ("deepgemm",)),
    "hf_sonicmoe": Peer(("hf", "prepare"), (_EXPERTS, "kernels"), ("sonicmoe",)),
    "vllm": Peer(("serving", "prepare_vllm"), ("vllm",)),
    "sglang": Peer(("serving", "prepare_sglang"), ("sglang",)),
    "triton_kernels": Peer(("triton_kernels", "prepare"), ("triton_kernels.matmul_ogs",)),
    "sonicmoe": Peer(("sonicmoe", "prepare"), ("sonicmoe",)),
}
