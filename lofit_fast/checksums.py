"""Checksums of the files in a folder, kept beside them: a changed byte is noticed when the folder is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from lofit_fast.files import read_json, write_json

SUMS_FILE = "lofit_checksums.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits, computed now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path, but: str, digest: Callable[[Path], str] = sha256_of) -> dict[str, str]:
    """By its path in the folder, the checksum of every file except the one called `but`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: digest(path) for name, path in sums.items() if name != but}


def write_sums(folder: Path, beside: Mapping[str, str] | None = None) -> None:
    """Put the checksums of a folder's files into the folder. beside: those of files that will stand beside them."""
    write_json(folder / SUMS_FILE, {"files": {**(beside or {}), **sums_of(folder, SUMS_FILE)}})


def written_sums(folder: Path) -> dict[str, str]:
    """What `write_sums` has put there; empty where there is no such file.

    Raises ValueError, naming it, for a file that is damaged.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    sums = content.get("files") if isinstance(content, Mapping) else None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"{path} is damaged: expected the checksum of each file")
    return sums


def unchanged_files(folder: Path, but: str) -> dict[str, str]:
    """Of what `write_sums` has found in a folder, the checksums of the files that are as they were.

    but: a pattern of names that are not looked at. Nothing where the checksums are damaged.
    """
    try:
        sums = written_sums(folder)
    except ValueError:
        return {}
    # a name leads nowhere else
    inside = {n: s for n, s in sums.items() if ".." not in Path(n).parts and not Path(n).is_absolute()}
    there = {n: s for n, s in inside.items() if not Path(n).match(but) and (folder / n).is_file()}
    return {name: expected for name, expected in there.items() if sha256_of(folder / name) == expected}


def check_sums(folder: Path, kind: str = "*", digest: Callable[[Path], str] = sha256_of) -> None:
    """Raise ValueError, naming the file, unless the files of a folder are as they were written with `write_sums`.

    kind: a pattern that the names of the files to look at fit. A folder without checksums passes; so do files that were
    added since.
    """
    for name, expected in written_sums(folder).items():
        path = folder / name
        if not path.match(kind):
            continue
        if not path.is_file() or digest(path) != expected:
            raise ValueError(
                f"{path} is damaged: it is not as it was written. If it was changed on purpose, delete "
                f"{folder / SUMS_FILE}"
            )
