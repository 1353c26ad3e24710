"""Fixtures of several folders, and what torch has to be told before it is imported."""

import os

import pytest

from tests.amount import ALL

if not ALL:
    # Without a cache Inductor has the compiler try, in every process, each set of vector instructions that the CPU has,
    # and then compiles longer; what it generates around the op is as good a caller in plain C++.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


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
