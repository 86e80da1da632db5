"""The command line called in this process: its output, its JSON, or the one line that says what went wrong."""

import json

from typer.testing import CliRunner

from lofit_fast.cli.app import app

ON_CPU = ("--dtype", "float32", "--device", "cpu")
# both steps, and what is left of them with given heads
QUICK = ("--select-epochs", "1", "--tune-epochs", "1", "--top", "2", *ON_CPU)
QUICK_STEP2 = ("--tune-epochs", "1", *ON_CPU)


def call(*arguments, code=0, **options):
    # wide enough that no table or help text is cut
    result = CliRunner().invoke(app, [str(a) for a in arguments], **{"terminal_width": 200, **options})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def as_json(*arguments, **options):
    """The one JSON value that is all of standard output."""
    return json.loads(call(*arguments, "--json", **options).stdout)


def error_of(*arguments):
    """The message of a command that is expected to fail: one line on standard error, nothing on standard output."""
    result = call(*arguments, code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.output
    # and the same as JSON
    (message,) = as_json(*arguments, code=1).values()
    assert lines[0] == f"error: {message}"
    return message
