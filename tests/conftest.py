"""Fixtures of several folders."""

import pytest


@pytest.fixture
def registered():
    """The op among transformers' implementations of experts."""
    from moe_ops.integrations import transformers as integration

    integration.register()


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of the op's calls by the integration with transformers."""
    from moe_ops.integrations import transformers as integration

    seen, original = [], integration.fused_moe
    monkeypatch.setattr(integration, "fused_moe", lambda *a, **kw: seen.append(kw) or original(*a, **kw))
    return seen
