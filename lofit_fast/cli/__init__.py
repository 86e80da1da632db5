"""The command line, `lofit-fast`. Importing this needs no extra: `main` says which one is missing."""

import sys


def main() -> None:
    """The entry point of `lofit-fast` and of `python -m lofit_fast.cli`."""
    try:
        from lofit_fast.cli.app import app
    except ImportError as error:
        sys.exit(f'error: the commands need the extra "train": pip install "lofit-fast[train]" ({error})')
    app()
