"""What makes a function a command: its examples in --help, one line for what goes wrong, and tables or JSON.

Exit codes: 0 done; 1 refused or failed, for a reason that the line gives; 2 no such option or value (typer's); 70 a
fault of ours; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lofit_fast.cli.company import DIVIDED, FIRST, Across, Company, speaking
from lofit_fast.cli.options import check_counts

FAILED, FAULT, INTERRUPTED, UNREAD = 1, 70, 130, 141
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RecursionError, MemoryError)
# typer's own ways to end a command
_ENDS = (typer.Exit, typer.Abort, typer.BadParameter)
# what torch says of a CPU's memory, in a RuntimeError like any other; of a GPU's it has a class
_NO_MEMORY = ("can't allocate memory", "not enough memory")
# signs of a message: a value that it quotes may be a whole file
_ROOM = 2000


class _Piped(Console):
    """A console that leaves it to the command what to do when nobody reads."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads the output")


out, err = _Piped(), Console(stderr=True)


def command(
    app: typer.Typer,
    *examples: str,
    program: str = "lofit-fast",
    name: str | None = None,
    goes_on: bool = False,
    across: Across = FIRST,
) -> Callable:
    """Register a command: its examples go into --help, expected errors become one line and exit code 1.

    goes_on: whether the command, when it is interrupted and called again, goes on where it was. across: what it does
    when torchrun or accelerate starts it as several processes.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **options):
            _quiet_libraries()
            company, result = Company(), None
            try:
                # a base that all hold together takes all of them, whatever is done with it
                company.meet(DIVIDED if options.get("tensor_parallel") else across)
                if company.works:
                    check_counts(function, options)
                    with company.at_work(f"lofit-fast {name or function.__name__}", options.get("device") or "auto"):
                        result = function(*args, **options)
                # what cannot be written is known only now
                sys.stdout.flush()
            except _ENDS as error:
                _drop_unwritable()
                company.ended(getattr(error, "exit_code", FAILED))
                raise
            except KeyboardInterrupt as error:
                again = ": the same command goes on where it was" if goes_on else ""
                raise typer.Exit(_interrupted(f"interrupted{again}", options, company)) from error
            except Exception as error:
                raise typer.Exit(_failed(error, options, company)) from error
            if code := company.ended(0):
                if company.lost:
                    with speaking():
                        say_error(company.lost, options.get("as_json"))
                raise typer.Exit(code)
            return result

        shown = [function.__doc__, across.said, "Examples:", *(f"  {program} {line}" for line in examples)]
        run.__doc__ = "\n\n".join(shown)
        return app.command(name)(run)

    return register


def say_error(message: str, as_json: bool | None = False) -> None:
    """One line about what went wrong, on standard error, or one JSON object."""
    message = _in_a_line(message)
    if as_json:
        print(json.dumps({"error": message}))
    else:
        err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def _interrupted(message: str, options: dict, company: Company) -> int:
    """Say that the command was interrupted; returns the exit code."""
    _end_bars()
    if company.speaks(elsewhere=False):
        with speaking():
            say_error(message, options.get("as_json"))
    return company.ended(INTERRUPTED)


def _failed(error: Exception, options: dict, company: Company) -> int:
    """Say what went wrong; returns the exit code."""
    _end_bars()
    unwritable = _drop_unwritable()
    if unwritable and isinstance(error, BrokenPipeError):
        return company.ended(UNREAD)
    if company.speaks(elsewhere=_is_elsewhere(error)):
        with speaking():
            code = _say(error, options.get("as_json") and not unwritable, company)
    else:
        code = _code_of(error)
    return company.ended(code)


def _say(error: Exception, as_json: bool | None, company: Company) -> int:
    """Print an error in a line; returns the exit code. as_json: JSON would go where the output has gone."""
    said, code = str(error) or type(error).__name__, _code_of(error)
    if _is_out_of_memory(error):
        said = f"out of memory: {said}"
    elif code == FAULT:
        said = f"a fault in lofit-fast, please report it with {_kept_traceback()}: {type(error).__name__}: {said}"
    say_error(company.named(said), as_json)
    return code


def _code_of(error: Exception) -> int:
    known = isinstance(error, _EXPECTED) or _is_elsewhere(error) or _is_out_of_memory(error)
    return FAILED if known else FAULT


def _is_elsewhere(error: Exception) -> bool:
    """Whether an error tells of another process of the launch, which has failed or is gone."""
    # by name: what defines it takes seconds to import
    return type(error).__name__ == "ElsewhereError"


def _end_bars() -> None:
    """Close the progress bars that what went wrong has left open: each would write once more, after the line."""
    # no bar without it
    if (bars := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            with suppress(OSError, ValueError):
                bar.close()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _in_a_line(message: str) -> str:
    """A message in a line that any terminal takes, and of a length that one reads."""
    said = " ".join(message.split())
    if len(said) > _ROOM:
        said = f"{said[: _ROOM // 2]} ... {said[-_ROOM // 2 :]} ({len(said)} signs)"
    # escape sequences, and halves of characters that no stream can write
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in said)


def _drop_unwritable() -> bool:
    """Whether standard output takes no more. What it still holds then goes nowhere: it would fail again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _kept_traceback() -> str:
    """The file that holds the traceback of the error that is being handled; where none can be written, a word on it."""
    text = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="lofit-fast-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
        return file.name
    except OSError:
        print(text, file=sys.stderr)
        return "the traceback above"


def show(report: dict, as_json: bool, title: str, footer: str = "") -> None:
    """A flat report as a table, its lists left out; or all of it as JSON."""
    if as_json:
        print(json.dumps(report))
        return
    table = Table("", "", title=title, show_header=False)
    for key, value in report.items():
        if not isinstance(value, list | dict):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)
    if footer:
        out.print(footer, highlight=False)


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
