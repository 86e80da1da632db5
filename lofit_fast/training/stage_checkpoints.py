"""A stage's checkpoints: folders that appear whole, say what they hold, and are believed only where they hold it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from lofit_fast.checksums import sha256_of
from lofit_fast.files import WriteError, file_errors, read_json, writable_folder
from lofit_fast.patching.storage import read_adapter
from lofit_fast.scratch import scratch_folder
from lofit_fast.sealed import read_sealed, write_sealed

# written last, with the size and the SHA-256 of every other file
WHOLE = "whole.json"
# the newest, and the one to go on from should that be damaged
KEPT = 2
OURS = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one. step: optimizer steps so far. epoch: epochs so far. over: whether the training ended with it."""

    path: Path
    step: int
    epoch: float
    over: bool


@contextmanager
def written_whole(folder: Path | str, step: int, epoch: float, over: bool) -> Iterator[Path]:
    """A scratch folder for a block that writes checkpoint-<step> into it; `folder` then has it, whole or not at all.

    Raises OSError, naming the folder, where a file cannot be written, whatever a library makes of that.
    """
    folder, name = writable_folder(folder), f"checkpoint-{step}"
    with file_errors(folder), scratch_folder(folder) as scratch:
        yield scratch
        files = {p.name: p for p in sorted((scratch / name).iterdir()) if p.is_file()}
        listed = {name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for name, p in files.items()}
        write_sealed(scratch / name / WHOLE, {"step": step, "epoch": epoch, "over": over, "files": listed})
        target = folder / name
        if target.is_dir() and not target.is_symlink() and not _is_ours(target):
            raise WriteError(folder, f"{name} is there, as something else")
        # one of this step that was damaged, or that a step trained again replaces
        remove(target)
        os.replace(scratch / name, target)


def keep_newest(folder: Path | str, kept: Iterable[int]) -> None:
    """Remove a stage's checkpoints but those of the given steps. What else is in the folder stays."""
    kept = set(kept)
    for step, path in _found(Path(folder)):
        if step not in kept:
            shutil.rmtree(path)


def last_whole(folder: Path | str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a stage, or None; and a sentence for every newer one that is passed over."""
    passed = []
    for step, path in sorted(_found(Path(folder)), reverse=True):
        try:
            return _checked(path, step), passed
        except (OSError, ValueError) as error:
            passed.append(f"{path} is passed over: {' '.join(str(error).split())[:300]}")
    return None, passed


def remove(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link and nothing of what it leads to. Nothing there is fine.

    Raises OSError where that fails.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders that are named and filled as checkpoints are; a link is none of ours."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    named = [(OURS.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return [(int(match[1]), path) for match, path in named if match and _is_ours(path)]


def _is_ours(path: Path) -> bool:
    names = {child.name for child in path.iterdir()}
    return not names or bool(names & {WHOLE, _STATE, "adapter_config.json", "adapter_model.safetensors"})


def _checked(path: Path, step: int) -> Checkpoint:
    """A checkpoint that is whole. Raises ValueError or OSError that says why it is not."""
    found = _as_sealed(path, step) if (path / WHOLE).exists() else _as_loaded(path, step)
    # its numbers must be finite too
    read_adapter(path)
    return found


def _as_sealed(path: Path, step: int) -> Checkpoint:
    """By the list of files that was written last."""
    content = read_sealed(path / WHOLE)
    files, epoch = content.get("files"), content.get("epoch")
    if content.get("step") != step or not isinstance(files, dict) or not isinstance(epoch, int | float):
        raise ValueError(f"{WHOLE} is not that of step {step}")
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ValueError(f"{name} is missing")
        if {"bytes": file.stat().st_size, "sha256": sha256_of(file)} != expected:
            raise ValueError(f"{name} is not what was written")
    # what resuming reads must be on the list, and not merely be there
    if absent := sorted({_STATE, *_STATES} - files.keys()):
        raise ValueError(f"{WHOLE} does not list {', '.join(absent)}")
    return Checkpoint(path, step, float(epoch), content.get("over") is True)


def _as_loaded(path: Path, step: int) -> Checkpoint:
    """By reading all of it: those of earlier releases have no list."""
    try:
        state = read_json(path / _STATE)
        told, epoch = state["global_step"], float(state["epoch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_STATE} is missing or damaged ({error})") from error
    if told != step:
        raise ValueError(f"{_STATE} is of step {told}, expected {step}")
    for name, read in _STATES.items():
        try:
            read(path / name)
        # a damaged archive can raise anything
        except Exception as error:
            raise ValueError(f"{name} is missing or damaged ({error})") from error
    return Checkpoint(path, step, epoch, over=False)


def _load(path: Path) -> object:
    # tensors and plain data alone: nothing in such a file is run
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_dict(path: Path, *names: str) -> None:
    content = _load(path)
    if not isinstance(content, dict) or not content.keys() >= set(names):
        raise ValueError(f"expected {', '.join(names)} in it")


# what a training goes on from beside the vectors, and how it is read
_STATES: dict[str, Callable[[Path], object]] = {
    "optimizer.pt": lambda path: _load_dict(path, "state", "param_groups"),
    "scheduler.pt": lambda path: _load_dict(path, "last_epoch"),
    "rng_state.pth": lambda path: _load_dict(path, "python", "numpy", "cpu"),
}
