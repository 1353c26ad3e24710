"""Every test in this folder needs a CUDA device."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _device_survives():
    """A test that broke the device fails itself, not the ones after it."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
