"""That padding rows of the down GEMM's result stay as they were: they would be bytes to write that nobody reads."""

from unittest import mock

import torch

from moe_ops.arguments import Arguments
from moe_ops.backends import pipeline
from moe_ops.testing import override, poisoned_memory
from tests.cases import option_case, run
from tests.quantized import quantized_case

# (format, variant) that leave it; docs/kernels.md names those that do not.
PADDED = [
    (None, "sorted"),
    (None, "pingpong"),
    ("fp8_channel", "pingpong"),
    ("fp8_static", "pingpong"),
    ("fp8_block", "blockscaled"),
    ("int4", "packed"),
    ("int8_weights", "mixed"),
    ("int4", "mixed"),
]
# Those of the first box, before which there are no rows that it could begin with, may be stored.
_FIRST_BOX = 64


def padded_case(name: str | None, device: str = "cpu") -> Arguments:
    """A call of a format, or of 16-bit weights, whose experts have few rows each."""
    if name is None:
        return option_case("plain", torch.bfloat16, device)
    return quantized_case(name, torch.bfloat16, device, num_tokens=40)


def assert_padding_left(args: Arguments, **forced) -> None:
    """Runs a call as it is forced and looks at its workspace: NaN in each padding row, and in no other."""
    workspaces, routings = [], []

    def kept(function, results: list):
        def keep(*given):
            results.append(function(*given))
            return results[-1]

        return keep

    with (
        mock.patch.object(pipeline, "_workspace", kept(pipeline._workspace, workspaces)),
        mock.patch.object(pipeline, "sort_routes", kept(pipeline.sort_routes, routings)),
        override(**forced),
        poisoned_memory(),
    ):
        run(args)
    rows, (routing,) = workspaces[-1], routings
    padding = routing.sorted_routes >= args.topk_ids.numel()
    padding[int(routing.num_padded) :] = True
    assert padding[_FIRST_BOX:].any() and not padding.all()
    assert not rows[~padding].isnan().any()
    assert rows[_FIRST_BOX:][padding[_FIRST_BOX:]].isnan().all()
