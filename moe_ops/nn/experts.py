"""`FusedExperts`: the experts of one layer, quantised or not, as a module whose forward is one call of the op."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_ops.activations import ACTIVATIONS
from moe_ops.api import fused_moe
from moe_ops.arguments import Arguments
from moe_ops.checks import require_name
from moe_ops.devices import describe
from moe_ops.dispatch import Plan, make_plan
from moe_ops.nn.moves import keep_dtype
from moe_ops.nn.parallel import expert_parallel
from moe_ops.problem import GATE_UP_LAYOUTS, make_problem
from moe_ops.quantization import FORMATS, quantize_weights
from moe_ops.quantization.scheme import WEIGHT_DTYPES, Scheme, scale_block, scale_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from moe_ops.distributed import DistributedPlan, ExpertParallel

_INT4_ZEROS, _INT8_ZERO, _E8M0_ONE = 0x88, 128, 127


class FusedExperts(nn.Module):
    """The experts of a layer: `moe_ops.fused_moe` with its weights.

        out[m] = routed_scaling_factor
                 * sum_k topk_weights[m, k] * (act(x[m] @ w1[e]^T + b1[e]) @ w2[e]^T + b2[e]),   e = topk_ids[m, k]

    `w1`, `w2`, `w1_bias` and `w2_bias` are parameters; `w1_scale`, `w2_scale`, `w1_zero_point` and `w2_zero_point`
    are buffers; the absent ones are None. All are in the state dict under these names. `.to(dtype)` changes the dtype
    of biases and unquantised weights, and never that of quantised weights and their scales. With `device="meta"`
    nothing is allocated; `to_empty` or `load_state_dict(..., assign=True)` brings the tensors.

    For inference: a backward raises NotImplementedError.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: as `moe_ops.fused_moe`; one that ends in "_no_gate" has w1 [E, I, H], any other [E, 2 * I, H].
        activation_alpha: as `moe_ops.fused_moe`.
        activation_limit: as `moe_ops.fused_moe`.
        gate_up_layout: "concatenated" or "interleaved", the order of the rows of w1.
        bias: with w1_bias [E, rows of w1] and w2_bias [E, H].
        quantization: "none" or a format of docs/quantization.md.
        block_shape: (128, 128) or (0, g), as the format has it.
        per_tensor: "fp8_w8a8" without blocks: scales [E] instead of [E, N].
        zero_points: "int8_w8a16" and "int4_w4a16" with groups: with zero points.
        apply_router_weight_on_input: as `moe_ops.fused_moe`.
        routed_scaling_factor: as `moe_ops.fused_moe`.
        deterministic: as `moe_ops.fused_moe`.
        path: as `moe_ops.fused_moe`.
        ep_group: the ranks that share the experts: a ProcessGroup, a DeviceMesh of one dimension, or an
            `ExpertParallel`. The tensors then hold this rank's experts alone; see docs/distributed.md.
        device: of the tensors.
        dtype: of biases and unquantised weights; torch.get_default_dtype() by default.

    Raises:
        ValueError: a size, name or combination of options is wrong.

    Example:
        >>> import torch
        >>> from moe_ops.nn import FusedExperts
        >>> experts = FusedExperts(4, hidden_size=64, intermediate_size=32)
        >>> topk_weights, topk_ids = torch.randn(2, 5, 4).softmax(-1).topk(2)
        >>> with torch.no_grad():
        ...     experts(torch.randn(2, 5, 64), topk_weights, topk_ids).shape
        torch.Size([2, 5, 64])
        >>> experts.quantize_("int4_w4a16", block_shape=(0, 32))
        FusedExperts(4 experts, hidden_size=64, intermediate_size=32, silu, int4_w4a16 in groups of 32, cpu)
    """

    w1: Tensor
    w2: Tensor
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    w1_scale: Tensor | None
    w2_scale: Tensor | None
    w1_zero_point: Tensor | None
    w2_zero_point: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        activation_alpha: float | None = None,
        activation_limit: float | None = None,
        gate_up_layout: str = "concatenated",
        bias: bool = False,
        quantization: str = "none",
        block_shape: Sequence[int] | None = None,
        per_tensor: bool = False,
        zero_points: bool = False,
        apply_router_weight_on_input: bool = False,
        routed_scaling_factor: float = 1.0,
        deterministic: bool = True,
        path: str = "auto",
        ep_group: "ProcessGroup | DeviceMesh | ExpertParallel | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        require_name("activation", activation, tuple(ACTIVATIONS))
        require_name("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
        require_name("quantization", quantization, FORMATS)
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.gate_up_layout = activation, gate_up_layout
        self.activation_alpha, self.activation_limit = activation_alpha, activation_limit
        self.ep = expert_parallel(ep_group, num_experts)
        self.num_local_experts = num_experts if self.ep is None else len(self.ep.local_experts)
        self.quantization = quantization
        self.block_shape = None if block_shape is None else tuple(block_shape)
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.routed_scaling_factor, self.deterministic, self.path = routed_scaling_factor, deterministic, path
        self._plan: tuple[int, Plan] | None = None
        dtype = dtype or torch.get_default_dtype()
        shapes = self._shapes(per_tensor, zero_points)
        for which in ("w1", "w2"):
            weight, weight_dtype = shapes[which], WEIGHT_DTYPES.get(quantization, (dtype,))[0]
            values = torch.empty(weight, device=device, dtype=weight_dtype)
            setattr(self, which, nn.Parameter(values, requires_grad=quantization == "none"))
            rows = torch.empty(self.num_local_experts, weight[1], device=device, dtype=dtype) if bias else None
            self.register_parameter(f"{which}_bias", None if rows is None else nn.Parameter(rows))
            for name in (f"{which}_scale", f"{which}_zero_point"):
                bytewise = name not in shapes or name.endswith("zero_point") or quantization == "mxfp4_w4a16"
                kind = torch.uint8 if bytewise else torch.float32
                made = torch.empty(shapes[name], device=device, dtype=kind) if name in shapes else None
                self.register_buffer(name, made)
        self.reset_parameters()

    def _shapes(self, per_tensor: bool, zero_points: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of weights, scales and zero points."""
        packed = self.quantization in ("int4_w4a16", "mxfp4_w4a16")
        rows = self.intermediate_size * (2 if ACTIVATIONS[self.activation].gated else 1)
        matrices = {"w1": (rows, self.hidden_size), "w2": (self.hidden_size, self.intermediate_size)}
        shapes: dict[str, tuple[int, ...]] = {}
        if self.quantization == "none" and (per_tensor or zero_points or self.block_shape is not None):
            raise ValueError(
                "block_shape, per_tensor or zero_points was given, but quantization is 'none' and does not use it; "
                "leave it out, or name a format"
            )
        for which, (n, k) in matrices.items():
            if packed and k % 2:
                size = "hidden_size" if which == "w1" else "intermediate_size"
                raise ValueError(f"{size} is {k}, expected an even number: two weights share a byte")
            shapes[which] = (self.num_local_experts, n, k // 2 if packed else k)
            if self.quantization == "none":
                continue
            scale_rows, scale_columns = scale_block(self.quantization, self.block_shape, per_tensor)
            scheme = Scheme(self.quantization, packed, scale_rows, scale_columns)
            shape = scale_shape(scheme, self.num_local_experts, n, k)[0]
            shapes[f"{which}_scale"] = shape
            if zero_points:
                if self.quantization not in ("int8_w8a16", "int4_w4a16") or scale_columns == 0:
                    raise ValueError(
                        f"zero_points is True, and quantization={self.quantization!r} with "
                        f"block_shape={self.block_shape} has none; leave it out, or pass 'int8_w8a16' or 'int4_w4a16' "
                        "and block_shape=(0, g)"
                    )
                shapes[f"{which}_zero_point"] = (self.num_local_experts, -(-n // 2) if packed else n, shape[2])
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the tensors: unquantised weights as `nn.Linear`'s, biases and quantised weights to zero."""
        for which, columns in (("w1", self.hidden_size), ("w2", self.intermediate_size)):
            weight, bias = getattr(self, which), getattr(self, f"{which}_bias")
            if self.quantization == "none":
                weight.uniform_(-(columns**-0.5), columns**-0.5)
            else:
                weight.fill_(_INT4_ZEROS if self.quantization == "int4_w4a16" else 0)
                scale, zero_point = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero_point")
                scale.fill_(_E8M0_ONE if self.quantization == "mxfp4_w4a16" else 1)
                if zero_point is not None:
                    zero_point.fill_(_INT4_ZEROS if self.quantization == "int4_w4a16" else _INT8_ZERO)
            if bias is not None:
                bias.zero_()

    def forward(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Runs the experts.

        Args:
            hidden_states: [..., H], the dtype of the weights (quantised: bfloat16, float16 or float32).
            topk_weights: [..., top_k], any floating-point dtype.
            topk_ids: [..., top_k], int32 or int64.
            expert_map: as `moe_ops.fused_moe`; not with `ep_group`.

        Returns:
            [..., H], the dtype of `hidden_states`.

        Raises:
            ValueError, TypeError: as `moe_ops.fused_moe`.
        """
        top_k = topk_ids.shape[-1]
        run = fused_moe if self.ep is None else self.ep.fused_moe
        out = run(
            hidden_states.reshape(-1, hidden_states.shape[-1]), self.w1, self.w2, topk_weights.reshape(-1, top_k),
            topk_ids.reshape(-1, top_k), expert_map=expert_map, **self._tensors(), **self._options(),
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def _tensors(self) -> dict[str, Any]:
        """The tensors beside w1 and w2, by argument name; None for the absent ones."""
        return {
            "w1_bias": self.w1_bias, "w2_bias": self.w2_bias, "w1_scale": self.w1_scale, "w2_scale": self.w2_scale,
            "w1_zero_point": self.w1_zero_point, "w2_zero_point": self.w2_zero_point,
        }  # fmt: skip

    def _options(self) -> dict[str, Any]:
        return {
            "activation": self.activation, "activation_alpha": self.activation_alpha,
            "activation_limit": self.activation_limit, "gate_up_layout": self.gate_up_layout,
            "quantization": self.quantization, "block_shape": self.block_shape,
            "apply_router_weight_on_input": self.apply_router_weight_on_input,
            "routed_scaling_factor": self.routed_scaling_factor, "deterministic": self.deterministic, "path": self.path,
        }  # fmt: skip

    @torch.no_grad()
    def quantize_(
        self,
        quantization: str,
        *,
        granularity: str | None = None,
        block_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        zero_points: bool = False,
    ) -> "FusedExperts":
        """Quantises the weights in place, by `moe_ops.quantization.quantize_weights`, one expert at a time.

        Args:
            quantization: the format.
            granularity: as `quantize_weights`.
            block_shape: as `quantize_weights`.
            dtype: as `quantize_weights`.
            zero_points: as `quantize_weights`.

        Returns:
            The module itself.

        Raises:
            ValueError: the weights are quantised already, or as `quantize_weights`.
            TypeError: as `quantize_weights`.
        """
        if self.quantization != "none":
            raise ValueError(
                f"quantization is {self.quantization!r} already, expected a module with unquantised weights; quantise "
                "the weights it was made from"
            )
        # Both before either is replaced: an error leaves the module as it was.
        made = {
            which: quantize_weights(
                getattr(self, which), quantization, granularity=granularity, block_shape=block_shape, dtype=dtype,
                zero_points=zero_points,
            )
            for which in ("w1", "w2")
        }  # fmt: skip
        for which, (weight, scale, zero_point) in made.items():
            setattr(self, which, nn.Parameter(weight, requires_grad=False))
            setattr(self, f"{which}_scale", scale)
            setattr(self, f"{which}_zero_point", zero_point)
        self.quantization = quantization
        self.block_shape = None if block_shape is None else tuple(block_shape)
        self._plan = None
        return self

    @classmethod
    def from_hf(cls, module: nn.Module) -> "FusedExperts":
        """Makes one of an experts module of transformers, such as `model.model.layers[0].mlp.experts`.

        The weights are shared, not copied. Where the module keeps them as the op does, they are the same parameters;
        where it keeps them transposed (gpt-oss), `w1` and `w2` are transposed views of the same memory, which a `.to()`
        of either module takes apart. Scales of FP8 experts are shared too, but for those in e8m0, which become float32.

        Args:
            module: of a class decorated with transformers' `use_experts_implementation`; FP8Experts too.

        Returns:
            A FusedExperts that computes what `module` does.

        Raises:
            ValueError: the op has no such experts; the message says why.
        """
        # Waits for its first use: modules of one's own need nothing of the integration.
        from moe_ops.integrations.translate import biases_of, name_of, options_of, weights_of

        (w1, w2), biases = weights_of(module), biases_of(module)
        options: dict[str, Any] | str = options_of(module, w2.device)
        if isinstance(options, str):
            raise ValueError(f"module is a {name_of(type(module))}, which the op cannot run: {options}; keep it")
        scales = {name: options.pop(name) for name in ("w1_scale", "w2_scale") if name in options}
        experts, hidden, intermediate = w2.shape
        made = cls(experts, hidden, intermediate, bias=biases[0] is not None, device="meta", **options)
        for name, value in zip(("w1", "w2", "w1_bias", "w2_bias"), (w1, w2, *biases), strict=True):
            # Quantised weights take no gradient, even where transformers marks them so.
            if isinstance(value, Tensor) and not (isinstance(value, nn.Parameter) and not scales):
                value = nn.Parameter(value.detach(), requires_grad=value.requires_grad and not scales)
            setattr(made, name, value)
        for name, scale in scales.items():
            setattr(made, name, scale.detach())
        return made.train(module.training)

    def explain(self, num_tokens: int, top_k: int) -> "Plan | DistributedPlan":
        """Says how the op would run so many tokens; the module's repr then tells it, too. Runs nothing.

        Args:
            num_tokens: M.
            top_k: experts of a token.

        Returns:
            The `Plan`, for hidden states in the dtype of unquantised weights, or of biases, or else bfloat16; with
            `ep_group` a `moe_ops.distributed.DistributedPlan`.

        Raises:
            ValueError, TypeError: as `moe_ops.fused_moe`.
        """
        dtype = self.w1.dtype if self.quantization == "none" else torch.bfloat16
        if self.quantization != "none" and self.w1_bias is not None:
            dtype = self.w1_bias.dtype

        if self.ep is not None:
            device = self.w1.device
            return self.ep.explain(
                torch.empty(num_tokens, self.hidden_size, dtype=dtype, device=device), self.w1, self.w2,
                torch.empty(num_tokens, top_k, device=device),
                torch.empty(num_tokens, top_k, dtype=torch.int32, device=device),
                **self._tensors(), **self._options(),
            )  # fmt: skip

        def meta(like: Tensor) -> Tensor:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")

        others: dict[str, Any] = {name: meta(value) for name, value in self._tensors().items() if value is not None}
        args = Arguments(
            torch.empty(num_tokens, self.hidden_size, dtype=dtype, device="meta"), meta(self.w1), meta(self.w2),
            torch.empty(num_tokens, top_k, device="meta"),
            torch.empty(num_tokens, top_k, dtype=torch.int32, device="meta"),
            **others, **self._options(),
        )  # fmt: skip
        problem = make_problem(args, traced=True)
        if not self.w1.is_meta:
            problem = replace(problem, w1_address=self.w1.data_ptr() % 16, w2_address=self.w2.data_ptr() % 16)
        plan = make_plan(problem, describe(self.w1.device))
        self._plan = num_tokens, plan
        return plan

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedExperts":
        kept = [t for name, t in self._tensors().items() if not name.endswith("bias")]
        self._plan = None
        return super()._apply(keep_dtype(fn, kept + [self.w1, self.w2] * (self.quantization != "none")), recurse)

    def extra_repr(self) -> str:
        """Sizes, format, device, and the plan that `explain` was last asked for."""
        parts = [f"{self.num_local_experts} experts", f"hidden_size={self.hidden_size}"]
        if self.ep is not None:
            parts[0] += f" of {self.num_experts} experts, rank {self.ep.group.rank} of {self.ep.group.size}"
        parts += [f"intermediate_size={self.intermediate_size}", self.activation]
        if self.gate_up_layout != "concatenated":
            parts.append(self.gate_up_layout)
        weight = getattr(self, "w1", None)
        parts.append(str(getattr(weight, "dtype", None)) if self.quantization == "none" else self.quantization)
        if self.block_shape is not None:
            rows, columns = self.block_shape
            parts[-1] += f" in groups of {columns}" if rows == 0 else f" in blocks of [{rows}, {columns}]"
        if getattr(self, "w1_bias", None) is not None:
            parts.append("bias")
        parts.append(str(getattr(weight, "device", None)))
        if self._plan is not None:
            tokens, plan = self._plan
            parts.append(f"{tokens} tokens: {' '.join(filter(None, (plan.path, plan.variant)))}")
        return ", ".join(parts)
