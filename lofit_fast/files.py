"""Files that are written whole or not at all, and folders that keep nothing of a write that failed; JSON read back."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lofit_fast.scratch import scratch_folder

# no JSON of ours comes near it; what does is something else
JSON_BYTES = 2**26
# how libraries that are written in Rust report what the system told them, safetensors and tokenizers among them
_RUST = re.compile(r"\(os error (\d+)\)")
# how torch does, which keeps the reason to itself
_TORCH = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|cannot be opened|Parent directory|write\(\): fd \d+ failed"
)
_PROBE = bytes(2**16)


@contextmanager
def whole_folder(
    path: Path | str, *, last: str | None = None, withdraw: bool = False, instead_of: Iterable[str] = ()
) -> Iterator[Path]:
    """A scratch folder inside `path`, whose files move into `path` if the block ends well and vanish if it does not.

    Each file is replaced whole; files already in `path` under other names stay. A link is replaced, never written
    through. Folders that were made for a block that failed are removed again.

    Args:
        path: the folder, made if need be.
        last: the name of a file that moves in after all others: the one that readers begin with.
        withdraw: whether an old file of that name is taken away before anything moves, so that a reader who comes
            between finds nothing rather than a mixture of old and new.
        instead_of: names of files in `path` that are taken away unless new ones of these names move in.

    Raises:
        OSError: the folder cannot be written, or something fails to write in it; names it and the reason.
        TypeError / ValueError: what is no name of a folder, see `given_path`.
    """
    path = given_path(path)
    with file_errors(path):
        made = _absent(path)
        writable_folder(path)
        try:
            with scratch_folder(path) as scratch:
                yield scratch
                _move(scratch, path, last, withdraw, instead_of)
        except BaseException:
            _remove_empty(made)
            raise


def _move(scratch: Path, path: Path, last: str | None, withdraw: bool, instead_of: Iterable[str]) -> None:
    """Put all of a scratch folder into `path`, or nothing where one file has no place there."""
    sources = sorted(scratch.rglob("*"), key=lambda source: (source == scratch / (last or ""), source))
    moves = [(source, path / source.relative_to(scratch)) for source in sources]
    for source, target in moves:
        if source.is_dir() and target.is_symlink():
            raise WriteError(path, f"{target.name} is a link there, which may lead anywhere")
        if target.exists() and source.is_dir() != target.is_dir():
            raise WriteError(path, f"{target.name} is there, as something else")
    if withdraw and last is not None:
        (path / last).unlink(missing_ok=True)
    for old in {path / name for name in instead_of} - {target for _, target in moves}:
        old.unlink(missing_ok=True)
    for source, target in moves:
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(source, target)


class WriteError(OSError):
    """A write that failed. folder: where; reason: why; code: the system's number of it, or None."""

    def __init__(self, folder: Path, reason: str, code: int | None = None) -> None:
        super().__init__(f"cannot write to output folder {folder}: {reason}")
        self.folder, self.reason, self.errno = folder, reason, code

    def __reduce__(self) -> tuple[Any, ...]:
        # processes of a sweep hand it to each other
        return WriteError, (self.folder, self.reason, self.errno)


@contextmanager
def file_errors(folder: Path | str) -> Iterator[None]:
    """A scope in which a write that fails raises OSError naming the folder and the reason, whichever library writes.

    safetensors, tokenizers and torch raise errors of their own, and most name no file. What is no matter of files
    passes as it is. So does an OSError that names a file elsewhere, and BlockingIOError: another process is there, and
    nothing is wrong with the folder.
    """
    folder = Path(folder)
    try:
        yield
    except WriteError as error:
        # of a scratch folder inside this one, which nobody knows
        raise WriteError(folder, error.reason, error.errno) from error
    except OSError as error:
        if isinstance(error, BlockingIOError) or _is_elsewhere(error.filename, folder):
            raise
        raise WriteError(folder, error.strerror or str(error), error.errno) from error
    except Exception as error:
        if (found := _RUST.search(str(error))) is not None:
            raise WriteError(folder, os.strerror(int(found[1])), int(found[1])) from error
        if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
            raise _torch_error(folder, error) from error
        raise


def _is_elsewhere(file: object, folder: Path) -> bool:
    """Whether an error names a file, and one outside of the folder."""
    if not isinstance(file, str | bytes | os.PathLike):
        return False
    # unlike `Path.resolve`, at peace with links that lead to themselves
    place = Path(os.path.realpath(os.fsdecode(file)))
    return Path(os.path.realpath(folder)) not in (place, *place.parents)


def _torch_error(folder: Path, error: RuntimeError) -> WriteError:
    """The reason is found by writing again: a full disk is still full."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
    except OSError as found:
        return WriteError(folder, found.strerror or str(found), found.errno)
    return WriteError(folder, str(error).splitlines()[0], errno.EIO)


def write_text(path: Path | str, text: str) -> None:
    """Replace a file's content in one step. Raises OSError naming the folder and the reason."""
    path = given_path(path)
    with whole_folder(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: object) -> None:
    """Replace a file by `content` as indented JSON, in one step.

    Raises OSError as `write_text` does, ValueError for a number that is none or infinite, which JSON does not have:
    where it is meant, `as_json` makes a text of it.
    """
    if odd := next(_not_finite(content), None):
        raise ValueError(f"cannot write {path}: got {odd}, expected finite numbers, since JSON has no others")
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def as_json(content: Any) -> Any:
    """Plain data as a JSON file gives it back: tuples are lists, and "Infinity", "-Infinity" and "NaN" are texts."""
    return json.loads(json.dumps(content), parse_constant=str)


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are written alike: a list and a tuple are, 1 and 1.0 and True, which Python calls equal, not.

    What JSON does not have is compared by its `repr`.
    """
    first, second = (json.dumps(value, sort_keys=True, default=repr) for value in (one, other))
    return first == second


def _not_finite(content: object, at: str = "content") -> Iterator[str]:
    """Each number of plain data that is none or infinite, with its place."""
    if isinstance(content, float) and not math.isfinite(content):
        yield f"{at} = {content}"
    rows = content if isinstance(content, list | tuple) else ()
    for name, inner in content.items() if isinstance(content, Mapping) else enumerate(rows):
        yield from _not_finite(inner, f"{at}[{name!r}]")


def read_json(path: Path | str) -> object:
    """What a JSON file holds, in UTF-8.

    Raises OSError where there is no file to read (FileNotFoundError where there is nothing), ValueError, naming the
    file, for one that is cut or damaged, in another encoding, too large, too deep, or with two entries of one name.
    Infinity and NaN are read, which earlier releases wrote.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot read {path}: expected a file, got a folder or a device")
    with path.open("rb") as file:
        raw = file.read(JSON_BYTES + 1)
    try:
        if len(raw) > JSON_BYTES:
            raise ValueError(f"it has more than {JSON_BYTES} bytes")
        # editors on Windows put a mark before UTF-8
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=each_once)
    except RecursionError as error:
        raise ValueError(f"{path} is not whole JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error


def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, for the hook of `json.loads`. Raises ValueError for two entries of one name."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is there twice")
    return entries


def given_path(path: Path | str) -> Path:
    """The path that somebody has given.

    Raises TypeError for what is no path, and ValueError for an empty name, which would stand for the folder that the
    program happens to run in, and for one with a NUL, which no file has.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a file or folder, got {path!r}")
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"expected the path of a file or folder as text, got {name!r}")
    if not name or "\0" in name:
        raise ValueError(f"expected the path of a file or folder, got {name!r}")
    return Path(name)


def lasting_path(path: Path | str) -> Path:
    """The path that somebody has given, from the root: it stays the same should the working folder be changed.

    Links are not followed. Raises TypeError / ValueError as `given_path`.
    """
    return given_path(path).absolute()


def writable_folder(path: Path | str) -> Path:
    """Create the folder if need be and prove that it takes files.

    Raises OSError naming the folder and the reason, TypeError / ValueError as `given_path`.
    """
    path = given_path(path)
    made: list[Path] = []
    try:
        made = _absent(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(made)
        raise WriteError(path, error.strerror or str(error), error.errno) from error
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
