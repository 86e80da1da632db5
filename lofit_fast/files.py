"""Files that are written whole or not at all, and folders that keep nothing of a write that failed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """A scratch folder inside `path`, whose files move into `path` if the block ends well and vanish if it does not.

    Each file is replaced whole; files already in `path` under other names stay. Folders that were made for a block that
    failed are removed again. Raises OSError naming the folder when it cannot be written.
    """
    path = Path(path)
    made = _absent(path)
    writable_folder(path)
    scratch = Path(tempfile.mkdtemp(prefix=".lofit-", dir=path))
    try:
        yield scratch
        moves = [(source, path / source.relative_to(scratch)) for source in sorted(scratch.rglob("*"))]
        for source, target in moves:
            if target.exists() and source.is_dir() != target.is_dir():
                raise OSError(f"cannot write to output folder {path}: {target.name} is there, as something else")
        for source, target in moves:
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(source, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Replace a file's content in one step."""
    path = Path(path)
    with whole_folder(path.parent) as scratch:
        (scratch / path.name).write_text(text)


def write_json(path: Path | str, content: object) -> None:
    """Replace a file by `content` as indented JSON, in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def writable_folder(path: Path | str) -> Path:
    """Create the folder if need be and prove that it takes files. Raises OSError naming the folder and the reason."""
    path = Path(path)
    made = _absent(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(made)
        raise OSError(f"cannot write to output folder {path}: {error.strerror or error}") from error
    return path


def _absent(path: Path) -> list[Path]:
    """The folder and its parents that do not exist yet, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders of the list that are there and empty, the deepest first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # never made, or somebody else writes there meanwhile
            return
