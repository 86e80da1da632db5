"""Packages that only a part of the library needs. Where one is missing, the error says what to install."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# of which processes whose results are put together must have the same releases
_SHARED = ("torch", "transformers", "accelerate", "trl", "datasets", "safetensors", "tokenizers")


@contextmanager
def needing(package: str, extra: str, what: str) -> Iterator[None]:
    """A scope for an import: an ImportError in it becomes one that names the package and the extra that brings it.

    what: begins the sentence, "what needs package".
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: {install(extra)} ({error})") from error


def check_training() -> None:
    """Raise ImportError where transformers' Trainer could not run, before anything is changed."""
    with needing("accelerate", "train", "training"):
        import accelerate  # noqa: F401


def can_draw() -> bool:
    """Whether pictures can be drawn; a warning says what is missing. A finished run does not fail for one."""
    there = find_spec("matplotlib") is not None
    if not there:
        warnings.warn(f"no pictures: matplotlib is not installed: {install('train')}", stacklevel=2)
    return there


def shared_versions() -> dict[str, str]:
    """What processes that work together must have alike: library -> version, "none" where it is not installed."""
    # whoever has this module has that one, installed or in a checkout
    found = {"python": platform.python_version(), "lofit-fast": sys.modules["lofit_fast"].__version__}
    for name in _SHARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "lofit-fast[{extra}]"'
