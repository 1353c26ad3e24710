"""The rules of the house, held by the syntax trees of the package's files: imports, forbidden calls."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_ops

ROOT = Path(moe_ops.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400

# From the bottom up: a module imports from its own layer and from those below, and from nothing else of the package.
LAYERS = (
    {"schema", "env", "devices", "activations", "arguments", "checks", "memory", "routing"},
    {"problem", "quantization", "router", "exchange"},
    {"reference"},
    {"tuning"},
    {"dispatch"},
    {"plans"},
    {"registration"},
    {"api"},
    {"nn"},
)
# Beside the layers: what device code and its launchers may import.
BESIDE = {
    "kernels": {"kernels"},
    "backends": set.union(*LAYERS[:3], {"backends", "kernels", "dispatch"}),
}
# What backends may have of dispatch: what was decided, and never the deciding.
PLAN_NAMES = {"Plan", "row_stride"}
# (module, group it imports in spite of its layer): only where the import waits for its first use.
LAZY = {
    ("registration", "backends"), ("tuning.tuner", "backends"), ("nn.experts", "integrations"),
    ("nn.parallel", "distributed"),
}  # fmt: skip


def module_name(file: Path) -> str:
    """moe_ops/backends/cpu.py -> "backends.cpu", moe_ops/tuning/__init__.py -> "tuning", moe_ops/__init__.py -> ""."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def short(value) -> str:
    return str(value.relative_to(ROOT.parent)) if isinstance(value, Path) else repr(value)


def imports(tree: ast.AST) -> Iterator[tuple[str, str, bool]]:
    """(module, imported name or "", inside a function) of every import."""
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for node in ast.walk(f)}
    # What is there for type checkers alone is never imported.
    types = {
        id(node) for f in ast.walk(tree) if isinstance(f, ast.If) and dotted(f.test) == "TYPE_CHECKING"
        for node in ast.walk(f)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                ("." * node.level + (node.module or ""), alias.name, id(node) in inside) for alias in node.names
            )


def import_complaints(module: str, source: str) -> list[str]:
    """What a module's imports break."""
    complaints = []
    group = module.split(".")[0]
    rank = next((rank for rank, layer in enumerate(LAYERS) if group in layer), None)
    for imported, name, lazy in imports(ast.parse(source)):
        what = f"{module} imports {imported}.{name}" if name else f"{module} imports {imported}"
        if imported.startswith("."):
            complaints.append(f"{what}: relative")
        if imported.split(".")[0] != "moe_ops":
            if group == "kernels" and imported.split(".")[0] != "triton":
                complaints.append(f"{what}: device code needs triton only")
            if rank is not None and module != "tuning.tuner" and imported.split(".")[0] == "triton":
                complaints.append(f"{what}: triton is for kernels and backends")
            continue
        target = imported.split(".")[1] if "." in imported else name
        if target == group or (rank is None and group not in BESIDE):
            continue
        allowed = BESIDE[group] if group in BESIDE else set().union(*LAYERS[: rank + 1])
        if target not in allowed and not (lazy and (module, target) in LAZY):
            complaints.append(f"{what}: not allowed there")
        if group == "backends" and target == "dispatch" and name not in PLAN_NAMES:
            complaints.append(f"{what}: backends carry a plan out, they do not make one")
    return complaints


@pytest.mark.parametrize("file", FILES, ids=short)
def test_who_imports_whom(file):
    assert import_complaints(module_name(file), file.read_text()) == []


def test_every_module_of_the_core_has_a_layer():
    free = {"", "__main__", "cli", "testing", "integrations", "aot", "distributed"}
    groups = {module_name(file).split(".")[0] for file in FILES}
    assert groups <= free | set(BESIDE) | set().union(*LAYERS)
    assert {"problem", "dispatch", "registration", "api", "kernels", "backends", "tuning"} <= groups


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.route", "import torch"),
        ("kernels.route", "from moe_ops.routing import Routing"),
        ("backends.tma", "from moe_ops.dispatch import make_plan"),
        ("backends.tma", "from moe_ops import dispatch"),
        ("backends.tma", "def f():\n    from moe_ops.registration import plan"),
        ("backends.cpu", "from moe_ops.tuning import tile_configs"),
        ("dispatch", "from moe_ops.backends import cpu"),
        ("dispatch", "def f():\n    from moe_ops.kernels import route"),
        ("dispatch", "import triton"),
        ("tuning.heuristics", "from moe_ops.kernels import route"),
        ("tuning.heuristics", "def f():\n    from moe_ops.backends import tma"),
        ("tuning.tuner", "from moe_ops.backends import tma"),
        ("registration", "from moe_ops.backends import tma"),
        ("registration", "def f():\n    from moe_ops.kernels import route"),
        ("registration", "from moe_ops.api import fused_moe"),
        ("api", "def f():\n    from moe_ops.backends import tma"),
        ("api", "from moe_ops.nn import FusedExperts"),
        ("nn.experts", "from moe_ops.integrations import translate"),
        ("reference", "from moe_ops.dispatch import Plan"),
        ("problem", "import moe_ops.reference"),
        ("problem", "from .dispatch import Plan"),
        ("activations", "from moe_ops.problem import Problem"),
        ("quantization.formats", "from moe_ops.registration import plan"),
        ("dispatch", "from moe_ops import testing"),
    ],
)
def test_import_rules_can_be_broken(module, source):
    assert import_complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("registration", "def f():\n    from moe_ops.backends import tma"),
        ("tuning.tuner", "def f():\n    from moe_ops.backends import tma"),
        (
            "backends.tma",
            "import triton\nfrom moe_ops.kernels import route\nfrom moe_ops.dispatch import Plan, row_stride",
        ),
        ("kernels.route", "import triton.language as tl\nfrom moe_ops.kernels.compat import gdc_wait"),
        ("api", "from moe_ops import registration"),
        ("cli.bench", "from moe_ops.backends import tma"),
    ],
)
def test_import_rules_let_pass_what_they_should(module, source):
    assert import_complaints(module, source) == []


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "subprocess", "pty"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"os.system", "os.popen", "torch.load", "triton.set_allocator", "set_allocator"}
READS_ENVIRONMENT = {"env", "devices"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as a string, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def call_complaints(module: str, source: str) -> list[str]:
    """Statements and calls that have no place in the package."""
    tree = ast.parse(source)
    complaints = [f"import of {name}" for name, _, _ in imports(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    environment = [name for name, what, _ in imports(tree) if name == "os" and what in ("environ", "getenv")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and module.split(".")[0] != "testing":
            complaints.append(f"assert in line {node.lineno}")
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_BUILTINS:
                complaints.append(f"{dotted(node.func)}() in line {node.lineno}")
            if any(k.arg == "shell" and dotted(k.value) != "False" for k in node.keywords):
                complaints.append(f"shell= in line {node.lineno}")
        name = dotted(node)
        if name in FORBIDDEN_ATTRIBUTES or (isinstance(node, ast.Attribute) and node.attr == "set_allocator"):
            complaints.append(f"{name or 'set_allocator'} in line {node.lineno}")
        if name in ("os.environ", "os.getenv", "os.environb", "os.putenv"):
            environment.append(name)
    if environment and module not in READS_ENVIRONMENT:
        complaints.append(f"{environment[0]}: the environment is read in moe_ops/env.py")
    return complaints


@pytest.mark.parametrize("file", FILES, ids=short)
def test_nothing_forbidden(file):
    assert call_complaints(module_name(file), file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "assert x > 0, 'for a user'",
        "import pickle",
        "from marshal import loads",
        "import subprocess",
        "eval('1')",
        "exec('x = 1')",
        "os.system('true')",
        "torch.load(path)",
        "run('true', shell=True)",
        "triton.set_allocator(f)",
        "from triton import set_allocator\nset_allocator(f)",
        "runtime.driver().set_allocator(f)",
        "os.environ['A']",
        "from os import environ",
        "os.getenv('A')",
    ],
)
def test_forbidden_things_are_found(source):
    assert call_complaints("dispatch", source)


def test_devices_reads_one_foreign_variable():
    tree = ast.parse((ROOT / "devices.py").read_text())
    read = [n.args[0].value for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == "os.environ.get"]
    assert read == ["TRITON_INTERPRET"]


# On the CPU backend a look at the ids is free; elsewhere it stops the stream and breaks a graph's capture.
SYNCS = {"item", "tolist", "cpu", "nonzero", "synchronize", "unique", "bincount", "masked_select"}


@pytest.mark.parametrize("file", sorted((ROOT / "backends").glob("*.py")), ids=short)
def test_no_host_sync(file):
    tree = ast.parse(file.read_text())
    found = {
        n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    } & SYNCS
    assert bool(found) == (file.name == "cpu.py"), found


BESIDE_IT = [
    file
    for folder in ("benchmarks", "csrc_stubs", "examples", "scripts")
    for file in sorted((ROOT.parent / folder).iterdir())
    if file.suffix in (".py", ".sh", ".cpp", ".h")
]


@pytest.mark.parametrize("file", FILES + BESIDE_IT, ids=short)
def test_file_length(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_triton_nor_cuda():
    code = """
import sys, torch
import moe_ops
x, ids = torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int32)
moe_ops.fused_moe(x, torch.ones(2, 16, 16), torch.ones(2, 16, 8), torch.ones(1, 1), ids)
moe_ops.route(ids, 2, 16)
lazy = [name for name in sys.modules if name.startswith(("moe_ops.kernels", "moe_ops.testing", "moe_ops.cli"))]
print(lazy, "triton" in sys.modules, torch.cuda.is_initialized())
"""
    assert run_python(code) == "[] False False"


def test_cpu_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it raises
import torch, moe_ops
x, ids = torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int32)
print(*moe_ops.fused_moe(x, torch.ones(2, 16, 16), torch.ones(2, 16, 8), torch.ones(1, 1), ids).shape)
"""
    assert run_python(code) == "1 16"
