"""JSON objects that carry a checksum of their own content, so that a changed byte is noticed when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lofit_fast.files import read_json, write_json

SEAL = "sha256"


def write_sealed(path: Path | str, content: Mapping[str, object]) -> None:
    """Replace a file by `content` as indented JSON with its SHA-256 under "sha256", in one step.

    Raises OSError when it cannot be written, ValueError for a number that JSON does not have, as `write_json` does.
    """
    plain = json.loads(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    write_json(path, {**plain, SEAL: seal_of(plain)})


def read_sealed(path: Path | str) -> dict[str, object]:
    """The content of such a file, without its checksum. One of an earlier release has none, and is taken as it is.

    Raises OSError when it cannot be read, and ValueError, naming the file, when it is not whole JSON, is no object, or
    is not what was written.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return unsealed(content, path)


def unsealed(content: dict[str, object], path: Path | str) -> dict[str, object]:
    """What was read from a file, without its checksum. Raises ValueError, naming the file, where that is another's."""
    if SEAL in content and content.pop(SEAL) != seal_of(content):
        raise ValueError(
            f"{path} is not what was written: its content has another SHA-256 than it says. If you have changed it on "
            f'purpose, take the line with "{SEAL}" out of it'
        )
    return content


def seal_of(content: Mapping[str, object]) -> str:
    """SHA-256 of plain data, in hexadecimal digits: the same for whatever order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
