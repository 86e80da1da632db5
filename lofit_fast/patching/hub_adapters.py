"""Adapter folders on the Hugging Face hub: found under `user/name`, fetched into the hub's own cache, and nothing else.

A folder of that name here wins. Only an adapter's two files are fetched, and only what describes an adapter is followed
by its tensors. `storage.read_adapter` checks them as it does local ones.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lofit_fast.config import shown
from lofit_fast.files import given_path
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, description_in

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[^@\s]+))?")
# what the hub itself takes for the name of a repository
_LONGEST = 96


def adapter_folder(name: Path | str, revision: str | None = None) -> Path:
    """The folder of an adapter: one that is here, or the hub's `user/name`, fetched or found in the hub's cache.

    name: a folder, or a hub id, with "@revision" behind it if need be. A `Path`, and whatever is there in the file
    system, is a folder. revision: a branch, tag or commit of the hub.
    Warns where a folder that is here has the name of a repository that is in the hub's cache.
    Raises TypeError / ValueError for a name that is neither, a revision of a folder, or two of them, or a repository
    that holds no adapter of ours; FileNotFoundError for what is neither here nor there; OSError for a hub that cannot
    be asked.
    """
    path = given_path(name)
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise ValueError(f"expected revision to be a branch, tag or commit of the hub, or None, got {shown(revision)}")
    found = hub_id(name)
    if found is None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of the hub: {name} is a folder")
        return path.expanduser()
    repo, own = found
    if own is not None and revision is not None:
        raise ValueError(f"expected one revision, got {own!r} in {name!r} and revision={revision!r}")
    return _fetched(repo, revision or own)


def hub_id(name: Path | str) -> tuple[str, str | None] | None:
    """(repository, revision) of a name that is the hub's; None for a folder's."""
    match = _ID.fullmatch(name) if isinstance(name, str) else None
    if match is None or not is_repository(match["repo"]):
        return None
    if not Path(name).exists():
        return match["repo"], match["revision"]
    if match["revision"] is None and _is_cached(match["repo"]):
        warnings.warn(
            f"{name} is a folder here and an adapter in the hub's cache: the folder is taken. Rename it, or name the "
            f"hub's with its revision, {name}@main",
            stacklevel=5,
        )
    return None


def is_repository(name: str) -> bool:
    """Whether the hub could have a repository of this name, `user/name`."""
    plain = ".." not in name and "--" not in name and not name.endswith((".git", ".ipynb", ".", "-"))
    return _ID.fullmatch(name) is not None and "@" not in name and len(name) <= _LONGEST and plain


def _is_cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, CONFIG_FILE), str | os.PathLike)


def _fetched(repo: str, revision: str | None) -> Path:
    """The folder in the hub's cache that holds a repository's adapter."""
    config = _file(repo, CONFIG_FILE, revision)
    # the commit's folder: both files are of one commit, whoever pushes meanwhile
    folder = config.parent
    with _of(repo, folder):
        description_in(folder)
    _file(repo, TENSOR_FILE, folder.name)
    return folder


def _file(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with asking_the_hub(repo, revision, name):
        return Path(hf_hub_download(repo, name, revision=revision, library_name="lofit-fast"))


@contextmanager
def _of(repo: str, folder: Path) -> Iterator[None]:
    """A scope in which an error about a file of the cache names the repository that it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{repo} on the hub holds no adapter that can be read: {error}") from error


@contextmanager
def asking_the_hub(repo: str, revision: str | None = None, file: str = "", pushing: bool = False) -> Iterator[None]:
    """A scope in which what the hub's library raises says what was asked, and what to do.

    pushing: whether files are put there rather than fetched.
    """
    from huggingface_hub import errors

    if pushing:
        with _pushing_to(repo):
            yield
        return
    at = "" if revision is None else f" at revision {revision!r}"
    # the first that fits: a gated repository is one that is not found, too
    table: tuple[tuple[type[Exception], type[Exception], Callable[[], str]], ...] = (
        (
            errors.OfflineModeIsEnabled,
            FileNotFoundError,
            lambda: f"{repo}{at}: the hub may not be asked (HF_HUB_OFFLINE): {_once(repo)}",
        ),
        (errors.LocalEntryNotFoundError, FileNotFoundError, lambda: f"{repo}{at}: {_absent(repo)}"),
        (
            errors.GatedRepoError,
            PermissionError,
            lambda: f"{repo} is gated on the hub: ask for access on its page, then log in with `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError,
            FileNotFoundError,
            lambda: (
                f"{repo}: no such folder here, and no such repository on the hub, or a private one: then log in with "
                "`hf auth login`"
            ),
        ),
        (errors.RevisionNotFoundError, FileNotFoundError, lambda: f"{repo} has no revision {revision!r} on the hub"),
        (
            errors.EntryNotFoundError,
            FileNotFoundError,
            lambda: f"{repo}{at} on the hub is no adapter of lofit-fast: it has no {file}",
        ),
        (OSError, OSError, lambda: f"{repo}{at}: the hub cannot be asked: {_absent(repo)}"),
    )
    try:
        yield
    except Exception as error:
        for kind, raised, message in table:
            if isinstance(error, kind):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise raised(f"{message()} ({reason})") from error
        if isinstance(error, ValueError):
            raise ValueError(f"{repo}{at}: {error}") from error
        raise


@contextmanager
def _pushing_to(repo: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{repo}: the adapter could not be pushed to the hub: {reason}. Check the network and HF_HUB_OFFLINE, and "
            "that `hf auth login` has given a token that may write there; dry_run=True writes the folder alone"
        ) from error


def _once(repo: str) -> str:
    return (
        f"fetch it once where there is a network (`hf download {repo} {CONFIG_FILE} {TENSOR_FILE}`), or copy the "
        "adapter folder here and name that"
    )


def _absent(repo: str) -> str:
    from huggingface_hub import constants

    silent = "may not be asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "does not answer"
    return f"no such folder here, none in the hub's cache, and the hub {silent}: {_once(repo)}"
