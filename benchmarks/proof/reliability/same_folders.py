"""Whether two folders hold the same results, bit for bit, but for what a clock has said and what resuming needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# what a clock says, or who ran it
CLOCKED = {"seconds", "tokens_per_s", "examples_per_s", "wall_seconds", "peak_memory_bytes", "process", "host"}
# pictures and tables of what stands in the JSON, with its seconds; answers of a clock
_SHOWN = (".png", ".csv", ".md", ".gguf")
# folders of what a clock has measured, and of when files were changed; of locks; and of who is in a sweep
_BY_CLOCK = ("autotune", "digests", "locks", "queue")
# what tells vectors apart to the last bit
_OF_VECTORS = ("state.json", "summary.json", "adapter_config.json")
# relative difference of vectors where one of two runs went on without its cache
_NEAR = 1e-3


def results(folder: Path) -> dict[str, Path]:
    """Every file that counts, by its place in the folder: no checkpoints, no locks, nothing hidden."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if _counts(path.relative_to(folder))}


def _counts(place: Path) -> bool:
    left_out = any(part.startswith(("checkpoint-", ".")) or part in _BY_CLOCK for part in place.parts)
    return not left_out and not place.name.endswith((".lock", ".owner.json"))


def difference(expected: Path, got: Path, *, near: bool = False) -> str | None:
    """What differs, in a sentence; None for nothing. near: whether vectors may differ by rounding; then caches may."""
    ours, theirs = results(expected), results(got)
    if near:
        ours, theirs = ({n: p for n, p in one.items() if not n.startswith("cache/")} for one in (ours, theirs))
    if ours.keys() != theirs.keys():
        absent, more = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        return f"other files than without interruption: lacks {absent}, has {more}"
    for name, path in ours.items():
        # some files name the folder that they are in
        if not _same((path, str(expected)), (theirs[name], str(got)), near):
            return f"{name} differs from that of the uninterrupted run"
    return None


def _same(first_of: tuple[Path, str], second_of: tuple[Path, str], near: bool) -> bool:
    (one, _), (other, _) = first_of, second_of
    if one.suffix in _SHOWN:
        return True
    if one.suffix == ".json":
        first, second = (_content(*of) for of in (first_of, second_of))
        return first == second or (near and one.name in _OF_VECTORS)
    if one.suffix == ".jsonl":
        first, second = ([_row(line) for line in p.read_text().splitlines()] for p in (one, other))
        return first == second or (near and _epochs(first) == _epochs(second))
    if one.suffix == ".safetensors":
        # what stands beside the tensors may name a folder, and stands in a JSON file too
        return _near(one, other, _NEAR if near else 0.0)
    return _digest(one) == _digest(other)


def _content(path: Path, folder: str) -> object:
    content = _timeless(json.loads(path.read_text().replace(folder, "")))
    if path.name == "state.json":
        # of the file with its seconds
        content.pop("sha256", None)
    return content


def _row(line: str) -> object:
    row = _timeless(json.loads(line))
    if isinstance(row, dict):
        # of the line with its seconds
        row.pop("sha256", None)
    return row


def _timeless(content: object) -> object:
    """Content of a JSON file without what a clock has said."""
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in CLOCKED}
    return [_timeless(one) for one in content] if isinstance(content, list) else content


def _epochs(rows: list) -> list[tuple]:
    return [(row.get("stage"), row.get("epoch")) for row in rows]


def _near(one: Path, other: Path, tolerance: float) -> bool:
    from safetensors.numpy import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        (first[name].shape, first[name].dtype) == (second[name].shape, second[name].dtype)
        and abs(first[name] - second[name]).max() <= tolerance * abs(first[name]).max()
        for name in first
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def partly_there(folder: Path) -> str | None:
    """A file that is there but not whole, after a kill. Checkpoints, which are whole by a mark, do not count."""
    from safetensors import SafetensorError, safe_open

    for name, path in results(folder).items():
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                twice = _twice(path)
                if twice:
                    return f"{name} has {twice}"
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    list(file.keys())
        except (ValueError, SafetensorError) as error:
            return f"{name} is there but not whole: {error}"
    return None


def _twice(path: Path) -> str | None:
    """The epoch that a history has twice, in words."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counted = Counter((row["stage"], row["epoch"]) for row in rows if "stage" in row)
    return next((f"epoch {epoch} of {stage} twice" for (stage, epoch), n in counted.items() if n > 1), None)


def scratch(folder: Path) -> Iterator[Path]:
    """What writes that never ended have left."""
    return folder.rglob(".lofit-*")
