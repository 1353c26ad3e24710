"""What it takes to test the op, for its own tests and for anybody else's: inputs, oracle, emulator, rule, overrides."""

from moe_ops.testing.emulator import emulate
from moe_ops.testing.inputs import ROUTINGS, exact_inputs, random_inputs
from moe_ops.testing.overrides import override, poisoned_memory
from moe_ops.testing.quantized import quantized_inputs
from moe_ops.testing.rule import Errors, assert_correct, assert_exact, errors
from moe_ops.testing.sanitizer import Report, SanitizerError, sanitized

__all__ = [
    "ROUTINGS",
    "Errors",
    "Report",
    "SanitizerError",
    "assert_correct",
    "assert_exact",
    "emulate",
    "errors",
    "exact_inputs",
    "override",
    "poisoned_memory",
    "quantized_inputs",
    "random_inputs",
    "sanitized",
]
