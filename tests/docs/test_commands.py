"""The commands of the pages can be typed as they stand: programs, files, options and their values."""

import contextlib
import io
import re
import shlex

import pytest

from moe_ops.cli import make_parser
from tests.checkout import ROOT
from tests.docs.pages import PAGES, Page

COMMANDS = [(page, command) for page in PAGES for command in page.commands]
MENTIONS = [(page, command) for page in PAGES for command in page.mentions]
TASKS = re.search(r"^TASKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
TARGETS = {*TASKS, "clean", "help"}
# Others' programs: what they are told is theirs to check.
FOREIGN = ("g++", "cmake", "twine")
# What a command before it makes.
MADE = ("build/cpp/run_package",)


def words_of(command: str) -> list[str]:
    """A command's words, without variables of the environment; names of what a reader puts in, in capitals, stay."""
    words = shlex.split(command.replace("...", ""))
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def complaint(command: str, *, whole: bool = True) -> str | None:
    """What is wrong with a command, or with a mention of one."""
    program, *arguments = words_of(command)
    program = program.removeprefix(".venv/bin/")
    if program in FOREIGN or program in MADE:
        return None
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        return None if set(targets) <= TARGETS else f"make has no {targets}"
    if program == "pip":
        return None if arguments[0] == "install" else f"pip {arguments[0]}"
    if program == "pytest":
        gone = [word for word in arguments if "/" in word and not (ROOT / word.split("::")[0]).exists()]
        return f"there is no {gone}" if gone else None
    if program.startswith(("benchmarks/", ".ci/")):
        return _script(program, arguments)
    if program != "python" or not arguments:
        return f"{program} is not known"
    if arguments[:2] == ["-m", "moe_ops"]:
        return _parsed(arguments[2:], whole)
    if arguments[0] == "-m":
        package = arguments[1].replace(".", "/")
        ours = arguments[1].startswith(("tests.", "moe_ops."))
        return None if not ours or (ROOT / f"{package}.py").exists() else f"there is no {package}.py"
    if arguments[0].startswith("-") or "/" not in arguments[0]:  # Python's own options, and programs of the reader's
        return None
    return _script(arguments[0], arguments[1:])


def _parsed(arguments: list[str], whole: bool) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            make_parser().parse_args(arguments)
    except SystemExit as exit:
        unfinished = re.search(r"are required|expected one argument", said.getvalue())
        return None if exit.code == 0 or (unfinished and not whole) else said.getvalue()
    return None


def _script(name: str, arguments: list[str]) -> str | None:
    """A script of ours: it is there, and its text names the options."""
    file = ROOT / name
    if not file.is_file():
        return f"there is no {name}"
    text = file.read_text()
    unknown = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in text]
    return f"{name} has no {unknown}" if unknown else None


def plain(command: str) -> str:
    """Brackets of what may be left out, away: its options are held too."""
    return re.sub(r"[\[\]]", "", command) if re.search(r" \[--", command) else command


def shown(value: object) -> str:
    return str(value.path) if isinstance(value, Page) else str(value)[:60]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=shown)
def test_command(page: Page, command: str):
    assert complaint(plain(command)) is None


@pytest.mark.parametrize(("page", "command"), MENTIONS, ids=shown)
def test_mention(page: Page, command: str):
    assert complaint(plain(command), whole=False) is None


def test_commands_are_found():
    assert len(COMMANDS) > 25 and len(MENTIONS) > 20
    assert len({page.path for page, _ in COMMANDS}) >= 6


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "python -m moe_ops benchmark",
        "python -m moe_ops bench --tokns 1",
        "python -m moe_ops bench --format fp9",
        "python -m moe_ops explain --shape 1,2",
        "python benchmarks/none.py",
        "python benchmarks/host_cost.py --chek",
        "python -m tests.mutants.tables",
        "pytest tests/gone",
        "benchmarks/none.sh",
    ],
)
def test_wrong_commands_are_found(command):
    assert complaint(command) and complaint(command, whole=False)


_READS = re.compile(r"""(?:environ(?:\.get)?[(\[]|getenv\(|flag\(|\$\{)"?(MOE_OPS_[A-Z_]+)""")


def variables() -> set[str]:
    """Environment variables of ours that something reads, the C++ library and the tests included."""
    found = set()
    for folder in ("moe_ops", "csrc_stubs", "examples", "tests", "scripts", "benchmarks"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".sh"):
                found |= set(_READS.findall(file.read_text()))
    return found


def test_environment_variables_have_their_row():
    text = (ROOT / "docs" / "environment.md").read_text()
    rows = set(re.findall(r"^\| `(MOE_OPS_\w+)`", text, re.MULTILINE))
    assert {"MOE_OPS_CONFIG_DIR", "MOE_OPS_AOT"} <= variables()
    assert rows == variables()
    for page in PAGES:
        assert set(re.findall(r"`(MOE_OPS_[A-Z_]+)\b", page.text)) <= rows, page.path
