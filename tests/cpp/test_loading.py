"""The C++ library beside Python's registration, in both orders; and the build with CMake."""

import shutil

import pytest

from scripts import build_cpp
from tests.amount import in_full

LOAD = "import sys, torch\ntorch.ops.load_library(sys.argv[1])\n"
# Whether the op's CPU kernel is Python's, which alone takes quantised weights, and that it is right.
CHECK = """
from moe_ops.quantization import quantize_weights
from moe_ops.testing import assert_correct, random_inputs
op = torch.ops.moe_ops.fused_moe_tma
args = random_inputs(num_tokens=7, hidden=64, intermediate=32, experts=4, top_k=2)
tensors = tuple(args.tensors().values())
assert_correct(op(*tensors), args)
out = torch.full((7, 64), torch.nan)
torch.ops.moe_ops.fused_moe_tma_(out, *tensors)
assert torch.equal(out, op(*tensors))
q1, q2 = (quantize_weights(w, "fp8_w8a8") for w in (args.w1, args.w2))
try:
    op(tensors[0], q1.weight, q2.weight, *tensors[3:], w1_scale=q1.scale, w2_scale=q2.scale, quantization="fp8_w8a8")
    print("kernel: Python")
except RuntimeError as error:
    assert "import moe_ops in Python before" in str(error), error
    print("kernel: C++")
"""
# What Python adds to ops that C++ has defined: fakes for torch.compile, and a backward that raises.
COMPILE = """
double = lambda *tensors: op(*tensors) * 2
compiled = torch.compile(double, fullgraph=True, dynamic=True, backend="aot_eager")
for num_tokens in (7, 3, 12):
    args = random_inputs(num_tokens=num_tokens, hidden=64, intermediate=32, experts=4, top_k=2)
    tensors = tuple(args.tensors().values())
    assert torch.equal(compiled(*tensors), double(*tensors))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
args.hidden_states.requires_grad_()
try:
    op(*args.tensors().values()).sum().backward()
except NotImplementedError as error:
    print("backward:", "no backward" in str(error))
"""


def test_library_alone(built, run_python):
    """The ops work in a Python process that never imports moe_ops."""
    code = LOAD + (
        "x, ids = torch.ones(2, 16), torch.zeros(2, 1, dtype=torch.int32)\n"
        "out = torch.ops.moe_ops.fused_moe_tma(x, torch.ones(3, 16, 16), torch.ones(3, 16, 8), torch.ones(2, 1), ids)\n"
        "print(out.shape, 'moe_ops' in sys.modules)"
    )
    assert run_python(code, built.library) == "torch.Size([2, 16]) False"


def test_library_first(built, run_python):
    out = run_python(LOAD + "import moe_ops\n" + CHECK + COMPILE, built.library)
    assert out.splitlines() == ["kernel: C++", "backward: True"]


def test_python_first(built, run_python):
    out = run_python("import moe_ops\n" + LOAD + CHECK, built.library)
    assert out.splitlines() == ["kernel: Python"]


def test_library_twice(built, tmp_path, run_python):
    """Under another name the loader takes it for another library, which then finds everything defined."""
    copy = shutil.copy(built.library, tmp_path / "copy.so")
    code = LOAD + "torch.ops.load_library(sys.argv[2])\nimport moe_ops\n" + CHECK
    assert run_python(code, built.library, copy) == "kernel: C++"


def test_library_of_another_version_is_refused(run_python):
    code = """
import torch
old = torch.library.Library("moe_ops", "DEF")
old.define("fused_moe_tma(Tensor hidden_states, Tensor w1, Tensor w2) -> Tensor")
try:
    import moe_ops
except ImportError as error:
    print(error)
"""
    message = run_python(code)
    assert message.startswith("moe_ops::fused_moe_tma is registered already, as ")
    assert "another version of moe_ops" in message and "build it again" in message


@in_full
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake: the library is also built by one g++ command")
def test_cmake(built, tmp_path, run_command, run_python):
    torch_root, source = build_cpp.torch_root(), build_cpp.SOURCES
    done = run_command("cmake", "-S", source, "-B", tmp_path, f"-DTORCH_ROOT={torch_root}", "-DCMAKE_BUILD_TYPE=Debug")
    assert done.returncode == 0, done.stderr
    done = run_command("cmake", "--build", tmp_path, "--target", "moe_ops", "--parallel", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_python(LOAD + "import moe_ops\n" + CHECK, tmp_path / "libmoe_ops.so") == "kernel: C++"
    done = run_command("cmake", "-S", source, "-B", tmp_path / "without", "-DTORCH_ROOT=/nowhere")
    assert done.returncode != 0 and "expected the folder of torch" in done.stderr


def test_cmake_and_docs_have_the_same_sources():
    text = (build_cpp.SOURCES / "CMakeLists.txt").read_text()
    assert f"MODULE {' '.join(build_cpp.LIBRARY_SOURCES)})" in text
    assert build_cpp.TARGET_VERSION.removeprefix("-D") in text
    docs = (build_cpp.ROOT / "docs" / "cpp.md").read_text()
    assert f"{build_cpp.TARGET_VERSION} -isystem $TORCH/include {' '.join(build_cpp.LIBRARY_SOURCES)} " in docs
    assert {f.name for f in build_cpp.SOURCES.glob("*.cpp")} == {*build_cpp.LIBRARY_SOURCES, "run_package.cpp"}


def test_no_python_in_the_library(built, run_command):
    for file in (built.library, built.runner):
        done = run_command("ldd", file)
        assert done.returncode == 0 and "libtorch_cpu" in done.stdout, done.stderr
        assert "libpython" not in done.stdout and "libtorch_python" not in done.stdout
