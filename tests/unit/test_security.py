"""What would make the package unsafe, looked for in its source: other people's code, input checks that vanish, int32.

The rules of the house (`test_house.py`) forbid assert, pickle, eval, exec, shells, torch.load and set_allocator. Here
are more ways to load code, and the arithmetic of addresses in kernels.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.unit.test_house import FILES, ROOT, call_complaints, dotted, imports, short

# Each runs, or may run, what is in a file or comes over the network.
LOADS_CODE = {
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "runpy.run_path", "os.execv",
    "os.spawnv", "torch.hub.load", "torch.jit.load", "torch.export.load", "torch.ops.load_library", "ctypes.CDLL",
    "torch.classes.load_library", "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
}  # fmt: skip
ALLOWS_CODE = {"allow_pickle", "trust_remote_code"}
LOADS_CODE_MODULES = {"socket", "urllib", "requests", "http", "ctypes", "cffi", "joblib", "runpy"}


def loading_complaints(source: str) -> list[str]:
    """Calls and imports that bring code from outside."""
    tree = ast.parse(source)
    complaints = [f"import of {name}" for name, _, _ in imports(tree) if name.split(".")[0] in LOADS_CODE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in LOADS_CODE:
                complaints.append(f"{dotted(node.func)}() in line {node.lineno}")
            if any(k.arg in ALLOWS_CODE and getattr(k.value, "value", None) is not False for k in node.keywords):
                complaints.append(f"pickles or remote code in line {node.lineno}")
    return complaints


@pytest.mark.parametrize("file", FILES, ids=short)
def test_nothing_loads_code(file):
    assert loading_complaints(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "yaml.load(text)",
        "torch.hub.load('a/b', 'c')",
        "torch.ops.load_library(path)",
        "ctypes.CDLL(path)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import socket",
        "from urllib.request import urlopen",
    ],
)
def test_loading_of_code_is_found(source):
    assert loading_complaints(source)


@pytest.mark.parametrize("source", ["json.load(file)", "yaml.safe_load(text)", "numpy.load(path, allow_pickle=False)"])
def test_harmless_loads_pass(source):
    assert loading_complaints(source) == []


@pytest.mark.parametrize(
    "source",
    ["assert x", "import pickle", "eval(s)", "exec(s)", "os.system(s)", "run(s, shell=True)", "torch.load(f)",
     "triton.set_allocator(f)"],
)  # fmt: skip
def test_the_house_forbids_the_rest(source):
    assert call_complaints("backends.tma", source)


# Addresses. A stride fits into int32 as a rule, and so does an expert or a row; their product does not.


def _is_int64(node: ast.AST, wide: set[str]) -> bool:
    """Whether an operand is int64 for sure: a cast, a tensor made so, what has one of them in it, or a name of such."""
    match node:
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, left, right]):
            return _is_int64(left, wide) or _is_int64(right, wide)
        case ast.Call(func=ast.Attribute(attr="to"), args=[dtype]):
            return dotted(dtype).endswith(".int64")
        case ast.Call(args=[*_, dtype]):
            return dotted(dtype).endswith(".int64")
        case ast.Name(id=name):
            return name in wide
        case ast.Subscript(value=value):
            return _is_int64(value, wide)
        case ast.BinOp(left=left, right=right, op=ast.Add() | ast.Sub() | ast.Mult()):
            return _is_int64(left, wide) or _is_int64(right, wide)
    return False


def _wide_names(function: ast.FunctionDef) -> set[str]:
    """Names of which every assignment in a function is int64."""
    values = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for name, value in zip(target.elts, node.value.elts, strict=False):
                        values.setdefault(dotted(name), []).append(value)
        elif isinstance(node, ast.For):
            values.setdefault(dotted(node.target), []).append(node.iter)
    wide, before = set(), None
    while wide != before:  # a sum of wide names is wide too
        before = wide
        wide = {name for name, all_values in values.items() if all(_is_int64(value, wide) for value in all_values)}
    return wide


def _names_stride(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id.startswith("stride_") for n in ast.walk(node))


def _products(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST, int]]:
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            yield node.left, node.right, node.lineno
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult):
            yield node.target, node.value, node.lineno


def narrow_products(source: str) -> list[str]:
    """Products of a stride and something that is not int64."""
    complaints = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        wide = _wide_names(function)
        for left, right, line in _products(function):
            if not (_names_stride(left) or _names_stride(right)):
                continue
            # `stride // UNIT * UNIT`, a hint to the compiler, is no larger than the stride.
            units = any(isinstance(side, ast.Constant) for side in (left, right))
            if not units and not _is_int64(left, wide) and not _is_int64(right, wide):
                complaints.add(f"line {line}: {ast.unparse(left)} * {ast.unparse(right)}")
    return sorted(complaints)


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_offsets_are_int64_before_they_are_multiplied(file):
    assert narrow_products(file.read_text()) == []


@pytest.mark.parametrize(
    "expression",
    [
        "w_ptr + expert * stride_we",
        "w_ptr + stride_we * expert",
        "x_ptr + rows[:, None] * stride_xm + columns",
        "x_ptr + (routes // top_k)[:, None] * stride_xm",
        # Too late, of the wrong kind, or of something else.
        "w_ptr + (expert * stride_we).to(tl.int64)",
        "w_ptr + expert.to(tl.int32) * stride_we",
        "w_ptr + expert * stride_we + rows.to(tl.int64) * stride_wn",
        "w_ptr + expert * (stride_we // 8 * 8)",
        "w_ptr + tl.load(experts_ptr + pid) * stride_we",
    ],
)
def test_narrow_products_are_found(expression):
    assert narrow_products(f"def kernel():\n    return {expression}")


@pytest.mark.parametrize(
    "body",
    [
        "expert *= stride_we",
        "rows = first.to(tl.int64)\n    rows = pid * BLOCK\n    p = x_ptr + rows * stride_xm",
        "rows, n = pid * BLOCK, n.to(tl.int64)\n    p = x_ptr + rows * stride_xm",
        "token = pid.to(tl.int64)\n    for token in range(8):\n        p = x_ptr + token * stride_xm",
    ],
)
def test_narrow_names_are_found(body):
    assert narrow_products(f"def kernel():\n    {body}")


@pytest.mark.parametrize(
    "body",
    [
        "p = w_ptr + expert.to(tl.int64) * stride_we + rows.to(gl.int64)[:, None] * stride_wn",
        "p = w_ptr + expert * stride_we.to(tl.int64)",
        "token = (pid // n).to(tl.int64)\n    p = x_ptr + token * stride_xm",
        "tokens = (routes // TOP_K).to(gl.int64)\n    p = x_ptr + tokens[:, None] * (stride_xm // 8 * 8)",
        "p = x_ptr + (rows.to(tl.int64) + 1) * stride_xm",
        "k = pid * BLOCK",
    ],
)
def test_wide_products_pass(body):
    assert narrow_products(f"def kernel():\n    {body}") == []


def test_the_kernels_have_strides_to_look_at():
    """The naming of strides is what the rule stands on."""
    products = [
        file.name
        for file in (ROOT / "kernels").glob("*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for left, right, _ in _products(function)
        if _names_stride(left) or _names_stride(right)
    ]
    assert len(products) >= 20
    assert {"combine.py", "gemv.py", "grouped_gemm.py", "pingpong.py"} <= set(products)
