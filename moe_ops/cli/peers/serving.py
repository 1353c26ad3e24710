"""The Triton fused MoE of the serving engines, with the configurations they ship."""

from collections.abc import Callable

from torch import Tensor

from moe_ops.arguments import Arguments


def prepare_vllm(args: Arguments) -> Callable[[], Tensor]:
    """vLLM's `fused_experts`."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda: fused_experts(*args.tensors().values())


def prepare_sglang(args: Arguments) -> Callable[[], Tensor]:
    """SGLang's `fused_experts`."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    # It asks a server's settings how to sum, and the group of GPUs for memory that it then takes elsewhere.
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
    get_parallel().override_permanently(tp_group=None)
    num_experts = args.w1.shape[0]
    # In place it would overwrite the tokens of all that is timed after it.
    config = MoeRunnerConfig(num_experts=num_experts, num_local_experts=num_experts, inplace=False)
    routing = StandardTopKOutput(args.topk_weights, args.topk_ids, None)
    return lambda: fused_experts(args.hidden_states, args.w1, args.w2, routing, config)
