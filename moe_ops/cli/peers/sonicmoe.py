"""SonicMoE, in inference mode."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops.arguments import Arguments
from moe_ops.cli.peers.weights import interleave_gate_up


def prepare(args: Arguments) -> Callable[[], Tensor]:
    """Readies its general routing, with gate and up interleaved as it wants them."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, top_k = args.topk_ids.shape
    x, w1, w2 = args.hidden_states, interleave_gate_up(args.w1).permute(1, 2, 0), args.w2.permute(1, 2, 0)
    routes = torch.arange(tokens, dtype=torch.int32, device=x.device).repeat_interleave(top_k)
    scores, experts = args.topk_weights.flatten().to(x.dtype), args.topk_ids.flatten()

    def call() -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        return moe_general_routing_inputs(
            x, scores, routes, experts, w1, None, w2, None, args.w1.shape[0], stream, ActivationType.SWIGLU, True
        )[0]

    return call
