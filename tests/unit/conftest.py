"""Fixtures of several files in this folder."""

import pytest
import torch

from moe_ops.tuning import lookup


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    """An empty MOE_OPS_CONFIG_DIR, and no table of the package."""
    monkeypatch.setenv("MOE_OPS_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path / "none")
    lookup.forget()
    yield tmp_path
    lookup.forget()


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("MOE_OPS_CONFIG_DIR", raising=False)
    lookup.forget()
