"""Switches for tests and tuning: force a path or tiles, poison uninitialised memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from moe_ops import dispatch
from moe_ops.tuning import TileConfig


@contextlib.contextmanager
def override(
    *,
    path: str | None = None,
    variant: str | None = None,
    config: TileConfig | tuple[TileConfig, TileConfig] | None = None,
    splits: int | None = None,
) -> Iterator[None]:
    """Forces the path, the kernel variant or the tiles of every call in the block, in this thread.

    Args:
        path: as the op's argument; stands above it.
        variant: as `Plan.variant`.
        config: the tile of both GEMMs, or (up, down). Without a variant it means "sorted", or "direct" where `block_m`
            is 1.
        splits: as `Plan.splits`, 1 to 64; in variants "sorted" and "packed" alone.

    Raises:
        ValueError: by the calls in the block, where the path or the variant cannot run, or not with these tiles.

    Example:
        >>> import moe_ops
        >>> from moe_ops.testing import override, random_inputs
        >>> args = random_inputs(num_tokens=3, hidden=16, intermediate=8, experts=4, top_k=2)
        >>> with override(path="reference"):
        ...     moe_ops.explain(*args.tensors().values()).path
        'reference'
    """
    up, down = config if isinstance(config, tuple) else (config, config)
    with dispatch.override(dispatch.Override(path, variant, up, down, splits)):
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every tensor allocated without a value in the block: NaN, or the largest integer.

    A result that depends on memory nobody wrote then shows it.

    Example:
        >>> import torch
        >>> from moe_ops.testing import poisoned_memory
        >>> with poisoned_memory():
        ...     torch.empty(2)
        tensor([nan, nan])
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose attribute torch adds when it runs
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
