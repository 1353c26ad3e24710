"""Every public docstring is complete: a sentence, arguments with their shapes, what comes back, what is raised, an
example that runs."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest

import moe_ops.distributed
import moe_ops.integrations.transformers
import moe_ops.nn
import moe_ops.quantization
import moe_ops.testing.strategies
from tests.unit.test_house import FILES, module_name, short

MODULES = [moe_ops, moe_ops.distributed, moe_ops.nn, moe_ops.quantization, moe_ops.testing]
# Without an __all__: what users of them are told to call.
NAMED = {moe_ops.testing.strategies: ("Call", "assert_result", "build", "calls", "formats")}
NAMED |= {moe_ops.integrations.transformers: ("register",)}
# What a docstring may say instead of a shape.
AS_ANOTHER = re.compile(r"likewise|\bas `|\bthe call\b|\bthe result\b")
SHAPE = re.compile(r"\[[^\]]*\]|\b(?:any shape|shapes?|shaped)\b")


def public() -> Iterator:
    """Functions and classes, and the methods that classes define themselves."""
    for module in (*MODULES, *NAMED):
        for name in NAMED.get(module, ()) or module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            yield pytest.param(value, id=f"{module.__name__}.{name}")
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield pytest.param(function, id=f"{module.__name__}.{name}.{method}")


PUBLIC = list(public())


def section(docstring: str, name: str) -> str:
    """The indented text below "Name:", "" if there is none."""
    lines = inspect.cleandoc(docstring).splitlines()
    if f"{name}:" not in lines:
        return ""
    rest = lines[lines.index(f"{name}:") + 1 :]
    end = next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return "\n".join(rest[:end])


def entry(text: str, name: str) -> str:
    """What a section says of one name."""
    match = re.search(rf"^    {re.escape(name)}: (.*(?:\n {{5,}}.*)*)", text, re.MULTILINE)
    return match[1] if match else ""


def complaints(value) -> list[str]:
    """What a docstring lacks."""
    docstring, wrong = value.__doc__ or "", []
    if not docstring.strip():
        return ["no docstring"]
    if not re.match(r".+[.:]$", docstring.strip().splitlines()[0]):
        wrong.append("the first line is not a sentence")
    if inspect.isclass(value):
        names = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())
        wrong += [
            f"attribute {name} is not explained" for name in names if not entry(section(docstring, "Attributes"), name)
        ]
        if not names and not issubclass(value, Exception):
            wrong += _arguments(inspect.signature(value), docstring) + _example(docstring)
        return wrong
    function = inspect.unwrap(value)
    signature = inspect.signature(function)
    method = next(iter(signature.parameters), "") in ("self", "cls")
    if method and "\n" not in docstring.strip():  # it says it all in its sentence
        tensors = any("Tensor" in str(parameter.annotation) for parameter in signature.parameters.values())
        return [*wrong, "a sentence without the shapes"] if tensors and not SHAPE.search(docstring) else wrong
    wrong += _arguments(signature, docstring)
    returns = str(signature.return_annotation)
    if returns not in ("None", "<class 'NoneType'>") and "Iterator" not in returns:
        said = section(docstring, "Returns")
        if not said.strip():
            wrong.append("what is returned is not explained")
        elif "Tensor" in returns and not (SHAPE.search(said) or AS_ANOTHER.search(said)):
            wrong.append("the shape of what is returned is not said")
    source = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(source))
    if (raises or function.__module__ == "moe_ops.api") and "Error: " not in section(docstring, "Raises"):
        wrong.append("what is raised is not explained")
    return wrong + ([] if method else _example(docstring))


def _arguments(signature: inspect.Signature, docstring: str) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text, wrong = section(docstring, "Args"), []
    for name, parameter in signature.parameters.items():
        if name in ("self", "cls"):
            continue
        said = entry(text, stars.get(parameter.kind, "") + name)
        if not said:
            wrong.append(f"{name} is not explained")
        elif "Tensor" in str(parameter.annotation) and not (SHAPE.search(said) or AS_ANOTHER.search(said)):
            wrong.append(f"the shape of {name} is not said")
    return wrong


def _example(docstring: str) -> list[str]:
    return [] if ">>> " in section(docstring, "Example") else ["no example"]


@pytest.mark.parametrize("value", PUBLIC)
def test_docstring(value):
    assert complaints(value) == []


def test_what_is_missing_is_found():
    def bare(x: "Tensor", n: int) -> "Tensor":  # noqa: F821
        """Does it

        Args:
            x: the values.

        Returns:
            The values.
        """
        raise ValueError(n)

    assert complaints(bare) == [
        "the first line is not a sentence",
        "the shape of x is not said",
        "n is not explained",
        "the shape of what is returned is not said",
        "what is raised is not explained",
        "no example",
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all(module):
    assert sorted(set(module.__all__), key=str) == sorted(module.__all__, key=str)
    assert all(hasattr(module, name) for name in module.__all__)


WITH_EXAMPLES = [file for file in FILES if ">>> " in file.read_text()]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=short)
def test_examples_run(file):
    try:
        module = importlib.import_module(f"moe_ops.{module_name(file)}".rstrip("."))
    except ImportError as error:
        if error.name in (None, "moe_ops") or error.name.startswith("moe_ops."):
            raise
        pytest.skip(f"{error.name} is not installed")
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_examples_are_there():
    assert {"api.py", "reference.py"} <= {file.name for file in WITH_EXAMPLES}
