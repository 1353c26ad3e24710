"""The C++ CUDA kernel without a GPU: what it would launch is what Python launches for the same call, every argument.

The library's `moe_ops_launches` says what it would launch for a table and a number of tokens. Beside it the backends
run on tensors of that very number of tokens, and what they launch is written down: no symbol and no formula takes part.
"""

import ast
import ctypes
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from moe_ops.aot.calls import call_text, parse_call
from moe_ops.aot.compiler import compile_launch
from moe_ops.aot.cubin import parameter_sizes
from moe_ops.aot.recording import Launch, Operand
from moe_ops.aot.table import argument_lines, digest, write_table
from moe_ops.backends import tma
from moe_ops.backends.launch import Recorder
from moe_ops.cli import main
from moe_ops.dispatch import make_plan
from moe_ops.problem import make_problem
from moe_ops.testing import quantized_inputs, random_inputs
from scripts import build_cpp
from tests.amount import ALL, params
from tests.aot.harness import DEVICES, make_call
from tests.cpp.conftest import require_compiler

HERE = Path(__file__).parent
DEVICE = DEVICES[90]
SMALL = {"hidden": 256, "intermediate": 128, "experts": 8, "top_k": 2}
# Numbers of tokens that no range begins with alone, and among them every variant and both sorts.
TOKENS = (1, 2, 3, 15, 64, 100, 129, 257, 700, 1025, 1100)
CALLS = {
    "plain": SMALL,
    "half": {**SMALL, "dtype": torch.float16, "activation": "gelu_tanh", "reduce_topk": False},
    "gpt_oss": {
        "hidden": 360, "intermediate": 72, "experts": 4, "top_k": 3, "bias": True, "activation": "swigluoai",
        "gate_up_layout": "interleaved", "activation_alpha": 1.1, "activation_limit": 6.5,
        "apply_router_weight_on_input": True, "routed_scaling_factor": 2.5, "out_dtype": torch.float32,
    },
    "no_gate": {**SMALL, "activation": "relu2_no_gate", "expert_map": torch.zeros(20, dtype=torch.int32)},
    "fp8_block": {**SMALL, "fp8": "block"},
    "fp8_channel": {**SMALL, "fp8": "channel"},
    "fp8_static": {**SMALL, "fp8": "tensor", "act_scales": 8},
}  # fmt: skip
FEW_TOKENS = (1, 3, 61, 300)
# The other formats, whose calls have scales of many shapes.
FORMATS = {
    "int4": {**SMALL, "quantization": "int4_w4a16", "block_shape": (0, 128), "zero_points": True},
    "mxfp4": {**SMALL, "quantization": "mxfp4_w4a16"},
    "int8_w8a16": {**SMALL, "quantization": "int8_w8a16", "granularity": "channel"},
    "int8_w8a8": {**SMALL, "quantization": "int8_w8a8", "granularity": "channel"},
    "inputs_given": {**SMALL, "quantization": "fp8_w8a8", "block_shape": (128, 128), "inputs_given": True},
}
# Every variant.
USUAL = ["plain", "no_gate", "fp8_block", "int4"]
# Beside "direct": what a few tokens take, and what many do.
VARIANTS = {
    "fp8_block": {"sorted", "blockscaled"}, "inputs_given": {"sorted", "blockscaled"}, "int4": {"packed", "mixed"},
    "mxfp4": {"packed", "mixed"}, "int8_w8a16": {"sorted", "mixed"}, "int8_w8a8": {"sorted"},
}  # fmt: skip


class Concrete(Recorder):
    """The launches of a call, with tensors and numbers."""

    def __init__(self):
        self.launches = []

    def record(self, kernel, grid, args, options):
        self.launches.append(Launch(kernel, grid, args, options))


class Places:
    """Names of memory: of arguments and the result by their address, of workspaces in the order they are met."""

    def __init__(self, **tensors):
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
        self.buffers = {}

    def operand(self, tensor):
        storage = tensor.untyped_storage()
        name = self.names.get(storage.data_ptr())
        if name is None:
            name = self.names[storage.data_ptr()] = f"buffer{len(self.buffers)}"
            self.buffers[name] = storage.nbytes()
        offset = (tensor.data_ptr() - storage.data_ptr()) // tensor.element_size()
        return Operand(name, tuple(tensor.shape), tensor.stride(), tensor.dtype, None, offset)

    def symbolic(self, value):
        if isinstance(value, torch.Tensor):
            return self.operand(value)
        if hasattr(value, "block_shape"):
            return dataclasses.replace(value, base=self.operand(value.base))
        return value


def python_launches(args) -> tuple[list[list[str]], list[int]]:
    """What Python launches, as lines of `moe_ops_launches`, and the sizes of the workspaces that launches get."""
    problem, recorder = make_problem(args), Concrete()
    plan = dataclasses.replace(make_plan(problem, DEVICE), kernels=recorder)
    out = args.hidden_states.new_empty(problem.out_shape, dtype=problem.out_dtype)
    tma.run(args, problem, plan, out)
    places, launches = Places(**args.tensors(), out=out), []
    for launch in recorder.launches:
        launch = dataclasses.replace(launch, args=tuple(map(places.symbolic, launch.args)))
        kernel = compile_launch(launch, 90)
        facts = kernel.name, 32 * kernel.num_warps, kernel.shared, int(kernel.dependent), launch.grid
        launches.append([f"launch {digest(kernel.cubin)}.cubin {' '.join(map(str, facts))}"])
        launches[-1] += argument_lines(launch, kernel)
    return launches, list(places.buffers.values())


def cpp_launches(library, folder, text, num_tokens) -> tuple[list[list[str]], list[int], list[int]]:
    """What C++ would launch, the sizes of the workspaces that launches get, and the shape of the result."""
    lines = ask(library, folder, text, num_tokens).splitlines()
    shape = [int(line.split()[1]) for line in lines if line.startswith("out ")]
    sizes = [int(line.split()[1]) for line in lines if line.startswith("buffer ")]
    launches, order = [], {}
    for line in lines[len(shape) + len(sizes) :]:
        if line.startswith("launch "):
            launches.append([])
        # Python's allocator sees only those workspaces that a launch gets, and sees them in that order.
        launches[-1].append(re.sub(r"\bbuffer\d+", lambda m: order.setdefault(m[0], f"buffer{len(order)}"), line))
    return launches, [sizes[int(name[6:])] for name in order], shape


def ask(library, folder, text, num_tokens) -> str:
    function = ctypes.CDLL(str(library)).moe_ops_launches
    function.restype = ctypes.c_char_p
    return function(str(folder).encode(), text.encode(), ctypes.c_int64(num_tokens)).decode()


def call(name, num_tokens):
    if name in FORMATS:
        return quantized_inputs(num_tokens=num_tokens, **FORMATS[name])
    return make_call(num_tokens, **CALLS[name])


def around(num_tokens) -> tuple[int, int]:
    """A range that ends there: its formulas are recorded for its first number of tokens."""
    return max(1, num_tokens - 1), num_tokens


@pytest.mark.parametrize("name", params([*CALLS, *FORMATS], USUAL))
def test_launches_are_pythons(built, tmp_path, name):
    text = call_text(call(name, 5))
    whole = ALL or name == "plain"
    tokens = TOKENS if whole and name in CALLS else FEW_TOKENS
    if whole:
        write_table(tmp_path, text, 1, max(tokens), DEVICE)
    variants = set()
    for num_tokens in tokens:
        if not whole:
            write_table(tmp_path, text, *around(num_tokens), DEVICE)
        args = call(name, num_tokens)
        variants.add(make_plan(make_problem(args), DEVICE).variant)
        expected, expected_sizes = python_launches(args)
        got, sizes, shape = cpp_launches(built.library, tmp_path, text, num_tokens)
        assert shape == list(make_problem(args).out_shape)
        assert sizes == expected_sizes
        assert len(got) == len(expected)
        for mine, pythons in zip(got, expected, strict=True):
            # Triton specialises on a number that happens to be a multiple of 16; a table's kernel has to serve others.
            if args.quantization != "none" and mine != pythons:
                mine, pythons = ([re.sub(r"launch \w+", "launch", lines[0]), *lines[1:]] for lines in (mine, pythons))
            assert mine == pythons
    assert variants == {"direct", *VARIANTS.get(name, {"sorted", "pingpong"})}


def build(out: Path, namespace: str, test_source: str, *sources: str):
    """Builds a test's file with some of the library's."""
    require_compiler()
    others = {str(build_cpp.SOURCES / name) for name in build_cpp.LIBRARY_SOURCES if name not in sources}
    command = [word for word in build_cpp.library_command(out, namespace) if word not in others]
    command += [str(HERE / test_source), f"-I{build_cpp.SOURCES}", "-O0", "-Wl,-Bsymbolic", "-Werror"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def text_of_call(tmp_path_factory):
    """The C++ text of a call."""
    out = tmp_path_factory.mktemp("text") / "text.so"
    build(out, "moe_ops_text", "call_text.cpp", "checks.cpp", "launch_table.cpp")
    torch.ops.load_library(str(out))

    def text(args) -> str:
        given = {name: getattr(args, name) for name in args.__slots__}
        return bytes(torch.ops.moe_ops_text.text_of_call(**given).tolist()).decode()

    return text


OPTIONS = {
    "int64": {**SMALL, "top_k": 3},
    "token_scales": {**SMALL, "a1_scale": torch.zeros(5, 1), "activation_limit": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CALLS, *FORMATS, *OPTIONS])
def test_texts_of_calls_are_alike(text_of_call, name):
    args = make_call(5, **OPTIONS[name]) if name in OPTIONS else call(name, 5)
    args.deterministic, args.path = False, "tma"
    text = call_text(args)
    assert text_of_call(args) == text
    parsed = parse_call(text, 5)
    assert call_text(parsed) == text
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(
        args.tensors().values(), parsed.tensors().values(), strict=True
    ))  # fmt: skip


def test_what_a_table_does_not_have_is_refused(built, tmp_path):
    args = random_inputs(num_tokens=3, **SMALL, dtype=torch.bfloat16)
    text = call_text(args)
    command = f"python -m moe_ops aot --arch 90 --shapes '{text}' --tokens 1-4096 --out {tmp_path}"
    answer = ask(built.library, tmp_path, text, 3)
    assert answer.startswith("error: the tables in") and command in answer
    # The command is meant to be copied.
    assert main(["aot", "--shapes", text, "--tokens", "3", "--out", str(tmp_path)]) == 0
    assert ask(built.library, tmp_path, text, 3).startswith("out 3\n")
    answer = ask(built.library, tmp_path, text, 5000)
    assert "has 3 to 3 tokens, not M = 5000" in answer and "--tokens 1-8192" in answer
    assert "MOE_OPS_AOT is '/nowhere'" in ask(built.library, "/nowhere", text, 3)


def test_text_of_weights_in_blocks(text_of_call):
    """mxfp4 weights may come as gpt-oss stores them; it is the same call."""
    args = call("mxfp4", 5)
    text = call_text(args)
    args.w1, args.w2 = (weight.view(*weight.shape[:2], -1, 16) for weight in (args.w1, args.w2))
    assert text_of_call(args) == text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("moe_ops launches 1", "moe_ops launches 0", "another version"),
        ("pointer out 0", "pointer nothing 0", "operand 'nothing' is unknown"),
        ("pointer buffer0 0", "pointer buffer9 0", "buffer9 is not there"),
        ("M 8 *", "M 8 ^", "is no formula"),
        ("launch 0", "launch 99", "kernel 99 is not there"),
        ("tokens 1 1", "", "comes before the first 'tokens'"),
    ],
)
def test_broken_tables_are_refused(built, tmp_path, old, new, words):
    text = call_text(make_call(1, **{**SMALL, "top_k": 8}))
    path = write_table(tmp_path, text, 1, 1, DEVICE)
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    answer = ask(built.library, tmp_path, text, 1)
    assert answer.startswith("error: ") and words in answer, answer


def test_declarations_of_the_driver(tmp_path):
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    require_compiler()
    command = [build_cpp.compiler(), "-std=c++17", "-fsyntax-only", f"-I{build_cpp.SOURCES}", f"-isystem{include}"]
    if not (include / "cuda.h").exists():
        pytest.skip("Triton has no cuda.h here")
    done = subprocess.run([*command, str(HERE / "cuda_abi.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What a driver that writes everything down is asked for, argv: the library, the folder of the table. The addresses of
# the arguments and of the result come first.
ON_FAKE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
call = torch.load(sys.argv[2])
out = torch.ops.moe_ops_fake.fused_moe_tma(**call)
tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)} | {"out": out}
print({name: tensor.data_ptr() for name, tensor in tensors.items()})
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The CUDA kernel for CPU tensors, with a driver that writes down what it gets."""
    out = tmp_path_factory.mktemp("fake") / "fake.so"
    build(out, "moe_ops_fake", "fake_driver.cpp", "checks.cpp", "launch_table.cpp", "fused_moe_cuda.cpp")
    return out


@pytest.mark.parametrize(("name", "tokens"), [("gpt_oss", (1, 61, 700)), ("fp8_block", (300,))])
def test_what_the_driver_gets(fake, tmp_path, run_python, name, tokens):
    """Launch attributes, tensor maps and the bytes of all parameters, against what Python launches."""
    for num_tokens in tokens:
        args = call(name, num_tokens)
        table = write_table(tmp_path, call_text(args), *around(num_tokens), DEVICE).read_text()
        kernels = [line.split()[1:] for line in table.splitlines() if line.startswith("kernel ")]
        sizes = [parameter_sizes((tmp_path / file).read_bytes(), function) for file, function, *_ in kernels]
        (tmp_path / "fake.sizes").write_text("".join(f"{' '.join(map(str, row))}\n" for row in sizes))
        torch.save({field: getattr(args, field) for field in args.__slots__}, tmp_path / "call.pt")
        environment = {"MOE_OPS_AOT": str(tmp_path), "FAKE_CUDA": str(tmp_path / "fake")}
        places = ast.literal_eval(run_python(ON_FAKE, fake, tmp_path / "call.pt", **environment))
        log = [line.split() for line in (tmp_path / "fake.log").read_text().splitlines()]
        set_shared = {(int(kernel), int(value)) for _, kernel, attribute, value in by_word(log, "set")}
        assert set_shared == {(i, int(k[3])) for i, k in enumerate(kernels) if int(k[3]) > 48 * 1024}
        expected, _ = python_launches(args)
        launches, maps = by_word(log, "launch"), by_word(log, "map")
        assert len(launches) == len(expected)
        for (_, number, *got), lines in zip(launches, expected, strict=True):
            _, _, function, threads, shared, dependent, grid = lines[0].split()
            assert kernels[int(number)][1] == function
            # Grid, block, shared memory; one attribute (6: may start while the launch before it ends), or none.
            assert got[:8] == [grid, "1", "1", threads, "1", "1", shared, dependent] and got[8:11] == ["6", "1", "1"]
            check_parameters(lines[1:], got[11:], maps, places)


def by_word(log: list[list[str]], word: str) -> list[list[str]]:
    return [line for line in log if line[0] == word]


def check_parameters(lines: list[str], parameters: list[str], maps: list[list[str]], places: dict[str, int]):
    """The parameters of a launch, in hex, against the lines of its arguments; two pointers to no scratch are last."""
    assert len(parameters) == len(lines) + 2 and [int(p, 16) for p in parameters[-2:]] == [0, 0]
    for i, (line, parameter) in enumerate(zip(lines, parameters, strict=False)):
        kind, *words = line.split()
        if kind in ("i32", "i64", "fp32"):
            assert len(parameter) == (16 if kind == "i64" else 8) and int(parameter, 16) == int(words[0])
            continue
        place, offset, *facts = words
        if kind == "pointer":
            # Of a workspace the first launch that has it says where it is; it begins there.
            start = places.setdefault(place, int(parameter, 16))
            assert len(parameter) == 16 and int(parameter, 16) == start + int(offset)
            continue
        dtype, item, swizzle, *box = map(int, facts)
        rank = len(box)
        numbers = [int(following.split()[1]) for following in lines[i + 1 : i + 1 + 2 * rank]]
        shape, strides = numbers[:rank], numbers[rank:]
        assert len(parameter) == 256
        found = list(map(int, maps[int(parameter[-16:], 16)][1:]))
        address = places.setdefault(place, found[1]) + int(offset)
        # No interleaving, L2 lines of 128 bytes, zeros past the end; the innermost dimension first.
        assert found == [
            dtype, address, 0, swizzle, 2, 0,
            *shape[::-1], *(item * stride for stride in strides[-2::-1]), *box[::-1], *[1] * rank,
        ]  # fmt: skip
