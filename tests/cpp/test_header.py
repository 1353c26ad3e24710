"""csrc_stubs/op_schema.h is what its script makes of the Python schemas, and the library defines just those."""

import pytest
import torch

from moe_ops import schema
from scripts import generate_schema_header as script

SCHEMAS = {"fused_moe_tma": schema.FUSED_MOE, "fused_moe_tma_": schema.FUSED_MOE_, "route": schema.ROUTE}


def test_header_is_up_to_date():
    assert script.HEADER.read_text() == script.header(), "run: python scripts/generate_schema_header.py"


def test_header_follows_the_schemas(monkeypatch):
    monkeypatch.setitem(script.SCHEMAS, "kRouteSchema", schema.ROUTE.replace("int block", "int block_size"))
    assert script.HEADER.read_text() != script.header()


@pytest.mark.parametrize("name", [*SCHEMAS, "_no_backward"])
def test_schemas_of_the_library(ops, name):
    text = SCHEMAS.get(name, schema.NO_BACKWARD)
    assert str(getattr(ops, name).default._schema) == str(torch._C.parse_schema(f"moe_ops_cpp::{text}"))
