"""The command line, `lofit-fast`. Importing this needs no extra: `main` says which one is missing."""

import os
import sys


def main() -> None:
    """The entry point of `lofit-fast` and of `python -m lofit_fast.cli`."""
    _fill_closed_streams()
    try:
        from lofit_fast.cli.app import app
        from lofit_fast.cli.company import hush
    except ImportError as error:
        sys.exit(f'error: the commands need the extra "train": pip install "lofit-fast[train]" ({error})')
    except KeyboardInterrupt:
        sys.exit(130)
    hush()
    app()


def _fill_closed_streams() -> None:
    """Give the standard streams that were closed a place to go: the next file that is opened would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
