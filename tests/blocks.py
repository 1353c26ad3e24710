"""Models around the op, for torch.compile, torch.export and AOTInductor; shared by the CPU and the GPU tests."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import moe_ops
from moe_ops.arguments import OPTION_ARGUMENTS, TENSOR_ARGUMENTS, Arguments
from moe_ops.testing import random_inputs
from tests.quantized import FORMATS, SIZES, quantized_case

_OF_TOKENS = ("hidden_states", "topk_weights", "topk_ids")


class TransformerBlock(nn.Module):
    """Causal attention, then a router over experts in the op beside a shared expert; the M tokens are one sequence.

    All sizes differ: torch.compile takes sizes that are equal when it traces for one and the same.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, *, scale: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.heads, self.top_k = 48 * scale, 3, 2
        intermediate, experts = 40 * scale, 5
        made = random_inputs(
            num_tokens=1, hidden=self.hidden, intermediate=intermediate, experts=experts, top_k=self.top_k,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.w1, self.w2 = nn.Parameter(made.w1), nn.Parameter(made.w2)
        options = {"bias": False, "device": device, "dtype": dtype}
        self.qkv = nn.Linear(self.hidden, 3 * self.hidden, **options)
        self.out = nn.Linear(self.hidden, self.hidden, **options)
        self.router = nn.Linear(self.hidden, experts, **options)
        self.shared_up = nn.Linear(self.hidden, 2 * intermediate, **options)
        self.shared_down = nn.Linear(intermediate, self.hidden, **options)
        self.norms = nn.ModuleList(nn.RMSNorm(self.hidden, device=device, dtype=dtype) for _ in range(2))

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """[M, H] -> hidden states after attention, and what the op is given: normed ones, routing weights, ids."""
        heads = self.qkv(self.norms[0](x)).view(-1, 3, self.heads, self.hidden // self.heads)
        attended = functional.scaled_dot_product_attention(*heads.permute(1, 2, 0, 3)[:, None], is_causal=True)
        x = x + self.out(attended[0].transpose(0, 1).flatten(1))
        normed = self.norms[1](x)
        topk_weights, topk_ids = self.router(normed).float().softmax(-1).topk(self.top_k)
        return x, normed, topk_weights, topk_ids

    def op(self, normed: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The op."""
        return moe_ops.fused_moe(normed, self.w1, self.w2, topk_weights, topk_ids)

    def after(self, x: Tensor, normed: Tensor, experts: Tensor) -> Tensor:
        """The shared expert and the sum."""
        gate, up = self.shared_up(normed).chunk(2, -1)
        return x + experts + self.shared_down(functional.silu(gate) * up)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[M, H] -> the block's result, the op's, and what the op was given."""
        x, *given = self.before(x)
        experts = self.op(*given)
        return self.after(x, given[0], experts), experts, *given

    def inputs(self, num_tokens: int, seed: int = 1) -> tuple[Tensor]:
        """Arguments of `forward`."""
        generator = torch.Generator(self.w1.device).manual_seed(seed)
        x = torch.randn(num_tokens, self.hidden, generator=generator, device=self.w1.device)
        return (x.to(self.w1.dtype),)


def assert_block(block: TransformerBlock, results: Sequence[Tensor], inputs: tuple[Tensor]) -> None:
    """What `forward` gave in another form: the op's result the eager op's to the bit, the block's within roundings.

    A fusion rounds less often, and where two experts are all but equal the router may then take the other one.
    """
    out, experts, *given = results
    assert torch.equal(experts, block.op(*given))
    expected, *_, ids = block(*inputs)
    same = (given[-1].sort().values == ids.sort().values).all(-1)
    assert (~same).sum() <= 1 + 0.03 * len(same)
    tolerance = 1e-4 if out.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out[same], expected[same], rtol=tolerance, atol=tolerance)


def num_graphs() -> int:
    """Graphs that torch.compile has made since its last reset of the counters."""
    return counters["stats"]["unique_graphs"]


def reset_compiler() -> None:
    """No graphs, and none counted."""
    torch._dynamo.reset()
    counters.clear()


_MAP = torch.tensor([2, -1, 0, 3, 1, 4], dtype=torch.int32)
_UNQUANTIZED = {
    "plain": {},
    "all_unquantized": {
        "bias": True,
        "expert_map": _MAP,
        "activation": "swigluoai",
        "activation_alpha": 1.1,
        "activation_limit": 2.0,
        "gate_up_layout": "interleaved",
        "apply_router_weight_on_input": True,
        "routed_scaling_factor": 2.5,
        "reduce_topk": False,
        "deterministic": False,
        "out_dtype": torch.float16,
    },
}
MAX_TOKENS = 320
# Together they use every argument of the schema.
CALLS = (*_UNQUANTIZED, *FORMATS)


def _make_call(name: str, num_tokens: int, dtype: torch.dtype, device: str) -> Arguments:
    if name in FORMATS:
        return quantized_case(name, dtype, device, num_tokens=num_tokens)
    options = dict(_UNQUANTIZED[name])
    if options:
        options["expert_map"] = options["expert_map"].to(device)
        # The reference looks at its ids, which a CUDA graph does not allow.
        options["path"] = "reference" if device == "cpu" else "classic"
    return random_inputs(dtype=dtype, device=device, **{**SIZES, "num_tokens": num_tokens, **options})


class Calls(nn.Module):
    """Calls of the op, side by side in one graph: each quantised format, and every argument at least once.

    What does not depend on the number of tokens is in buffers.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.options, self._given = [], []
        for number, name in enumerate(CALLS):
            args = _make_call(name, MAX_TOKENS, dtype, device)
            self.options.append({key: getattr(args, key) for key in OPTION_ARGUMENTS})
            self._given.append({key: getattr(args, key) for key in self._of_tokens(args)})
            for key, tensor in args.tensors().items():
                if key not in self._given[-1]:
                    self.register_buffer(f"{key}_{number}", tensor)

    @staticmethod
    def _of_tokens(args: Arguments) -> tuple[str, ...]:
        per_token = args.a1_scale is not None and args.a1_scale.ndim == 2
        return (*_OF_TOKENS, "a1_scale") if per_token else _OF_TOKENS

    def forward(self, calls: list[dict[str, Tensor]]) -> list[Tensor]:
        """The result of each call, whose tensors with a row per token are given."""
        results = []
        for number, (given, options) in enumerate(zip(calls, self.options, strict=True)):
            kept = {key: getattr(self, f"{key}_{number}", None) for key in TENSOR_ARGUMENTS}
            results.append(moe_ops.fused_moe(**{**kept, **given}, **options))
        return results

    def inputs(self, num_tokens: int) -> tuple[list[dict[str, Tensor]]]:
        """Arguments of `forward`, for at most `MAX_TOKENS`."""
        return ([{key: tensor[:num_tokens].clone() for key, tensor in given.items()} for given in self._given],)


def dynamic_tokens(inputs: tuple):
    """`dynamic_shapes` of torch.export for inputs all of whose tensors have a row per token."""
    tokens = torch.export.Dim("tokens", max=1 << 16)
    return torch.utils._pytree.tree_map(lambda tensor: {0: tokens}, inputs)


def used_arguments(calls: Calls) -> set[str]:
    """The arguments that some call gives a value which is not the default."""
    used = {name for given in calls.inputs(2)[0] for name in given}
    used |= {name.rsplit("_", 1)[0] for name, _ in calls.named_buffers()}
    defaults = {field.name: field.default for field in fields(Arguments)}
    return used | {name for options in calls.options for name, value in options.items() if value != defaults[name]}


def assert_calls(calls: Calls, results: Sequence[Tensor], inputs: tuple, *, packaged: bool = False) -> None:
    """Each result is that of the eager call, to the bit.

    Packages of torch 2.11 hand a dtype over as another one (pytorch/pytorch#169157), which docs/compile.md says too:
    results of calls with `out_dtype` are not looked at there if `packaged`.
    """
    lost = packaged and torch.__version__ < (2, 12)
    for name, options, got, expected in zip(CALLS, calls.options, results, calls(*inputs), strict=True):
        assert (lost and options["out_dtype"] is not None) or torch.equal(got, expected), name
