"""What makes a function a command: its examples in --help, one line for what goes wrong, and tables or JSON."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lofit_fast.cli.options import check_counts

out, err = Console(), Console(stderr=True)
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RecursionError)


def command(app: typer.Typer, *examples: str, program: str = "lofit-fast", name: str | None = None) -> Callable:
    """Register a command: its examples go into --help, expected errors become one line and exit code 1."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **options):
            _quiet_libraries()
            try:
                check_counts(function, options)
                return function(*args, **options)
            except _EXPECTED as error:
                message = " ".join(str(error).split())
                if options.get("as_json"):
                    print(json.dumps({"error": message}))
                else:
                    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
                raise typer.Exit(1) from error

        run.__doc__ = "\n\n".join([function.__doc__, "Examples:", *(f"  {program} {line}" for line in examples)])
        return app.command(name)(run)

    return register


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
