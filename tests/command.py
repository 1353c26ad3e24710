"""Commands of `python -m moe_ops`, run in this process."""

from moe_ops.cli import main


def error_of(capsys, *arguments: str) -> str:
    """The one line that wrong arguments give."""
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"python -m moe_ops {arguments[0]}: error: ")
    return captured.err


def output_of(capsys, *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out
