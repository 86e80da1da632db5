"""Damage to files, each kind a function of the file and a random number generator: what disks, people and attackers do.

Bytes are damaged in any file; JSON, TOML and safetensors at what they mean too; any file as an entry of its folder.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.proof.reliability.json_mutations import JSON, TOML
from benchmarks.proof.reliability.tensor_mutations import SAFETENSORS

# what a planted pickle leaves when it is run
RAN = Path("/tmp/lofit-fast-a-pickle-has-run")


def _flip_bit(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _other_byte(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def _cut(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _longer(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 64)))


def _zeros(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randrange(1, 64))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _twice(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randrange(1, 64))
    path.write_bytes(content[:end] + content[start:end] + content[end:])


def _empty(path: Path, draw: Random) -> None:
    path.write_bytes(b"")


def _noise(path: Path, draw: Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((1, 8, 100, 5000))))


def _planted(path: Path, draw: Random) -> None:
    path.write_bytes(pickle.dumps(_Planted(), protocol=draw.choice((2, 4))))


class _Planted:
    """What a pickle does when it is loaded: leave a folder where nothing may be written."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(RAN),)


BYTES: dict[str, Callable[[Path, Random], None]] = {
    "bit": _flip_bit,
    "byte": _other_byte,
    "cut": _cut,
    "longer": _longer,
    "zeros": _zeros,
    "run twice": _twice,
    "empty": _empty,
    "noise": _noise,
    "pickle": _planted,
}


def _removed(path: Path, draw: Random) -> None:
    path.unlink()


def _folder_instead(path: Path, draw: Random) -> None:
    path.unlink()
    path.mkdir()


def _linked_to(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


def _link_to_nothing(path: Path, draw: Random) -> None:
    _linked_to(path, path.parent / "nothing")


def _link_to_itself(path: Path, draw: Random) -> None:
    _linked_to(path, path.name)


def _link_outside(path: Path, draw: Random) -> None:
    # the same content, where nothing may be written
    outside = outside_of(path)
    shutil.copyfile(path, outside / path.name)
    _linked_to(path, outside / path.name)


def _folder_outside(path: Path, draw: Random) -> None:
    folder, outside = path.parent, outside_of(path)
    # the output folder itself, and a cache's, may be a link: that is where one wants it
    if TRIAL in (folder.name, folder.parent.name) or "cache" in path.parts:
        return
    target = outside / folder.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(folder, target)
    folder.symlink_to(target, target_is_directory=True)


def _pipe(path: Path, draw: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _of_another(path: Path, draw: Random) -> None:
    others = sorted(one for one in path.parent.iterdir() if one.is_file() and one != path)
    if others:
        shutil.copyfile(draw.choice(others), path)


ENTRIES: dict[str, Callable[[Path, Random], None]] = {
    "removed": _removed,
    "folder instead": _folder_instead,
    "link to nothing": _link_to_nothing,
    "link to itself": _link_to_itself,
    "link outside": _link_outside,
    "folder outside": _folder_outside,
    "pipe": _pipe,
    "content of another": _of_another,
}
# where the folder of a trial ends: what lies beside it is outside
TRIAL = "mutated"


def outside_of(path: Path) -> Path:
    """The folder beside that of the trial, in which nothing may be written."""
    top = next(folder for folder in path.parents if folder.name == TRIAL)
    outside = top.with_name("outside")
    outside.mkdir(exist_ok=True)
    return outside


def kinds_for(path: Path) -> dict[str, Callable[[Path, Random], None]]:
    """The kinds of damage that a file can be done, by name."""
    own = {".json": JSON, ".jsonl": JSON, ".toml": TOML, ".safetensors": SAFETENSORS}.get(path.suffix, {})
    return {**BYTES, **ENTRIES, **own}
