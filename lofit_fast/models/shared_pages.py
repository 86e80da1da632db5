"""One copy of a base in a machine's memory, however many processes load it.

Weights that are read from a safetensors file in the dtype of the file are its pages, mapped: the system keeps them once
for all processes, and copies a page when somebody writes into it, which merging does and training does not. In another
dtype every process would make numbers of its own. They are made once instead, in a file that all map.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lofit_fast.checksums import sums_of
from lofit_fast.files import read_json, whole_folder, writable_folder, write_json
from lofit_fast.launchers import launched
from lofit_fast.locks import alone
from lofit_fast.models.file_digest import digest_of
from lofit_fast.models.written_weights import write_model
from lofit_kernels.answers import cache_folder

if TYPE_CHECKING:
    from torch import nn

_MARKER = "shared_pages.json"
# of the bytes of a model, so many may be in another dtype: every process has them by itself
_APART = 0.05
# how safetensors writes the dtypes that models compute in
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FLOATING = {"F64", "F32", "BF16", "F16"}


def processes_here() -> int:
    """How many processes of the launch are on this machine; 1 where no launcher has started several."""
    found = launched()
    return 1 if found is None else found.local_count


# of workers that see no launcher
_beside = 1


def work_beside(count: int) -> None:
    """Say how many processes of this machine, this one among them, were started to work at the same time."""
    global _beside
    _beside = count


def memory_shares() -> int:
    """How many processes divide this machine's memory, as far as is known: those of a launch, or a sweep's workers."""
    return max(_beside, processes_here())


def as_mapped(source: str, dtype: torch.dtype, load: Callable[[str], nn.Module]) -> str:
    """What to load instead of `source`, so that its weights in `dtype` are pages of a file: often itself.

    load: loads a model from a folder or hub id, in dtype. The file is kept in `cache_folder()`, under the checksums of
    what it is made of; one process makes it, and the others wait.
    Raises OSError where the cache folder cannot be written, and what load raises.
    """
    files = weight_files(source)
    if not files or not copies(files, dtype):
        return source
    origin = {path.name: digest_of(path) for path in (*files, *_described(files[0].parent))}
    name = sha256(json.dumps([origin, str(dtype)]).encode()).hexdigest()[:16]
    folder = cache_folder() / "shared_pages" / f"{str(dtype).removeprefix('torch.')}-{name}"
    if _is_whole(folder, origin):
        return str(folder)
    locks = writable_folder(cache_folder() / "locks")
    with alone(locks / f"{folder.name}.lock", f"write the weights of {source} in {dtype}", wait=True):
        if not _is_whole(folder, origin):
            _write(folder, load(source), files[0].parent, origin)
    return str(folder)


@contextmanager
def in_turns(source: str, dtype: torch.dtype) -> Iterator[None]:
    """A scope in which one process of a machine at a time loads a base, where that makes numbers in its memory.

    For a base that goes on to an accelerator: as many whole copies at once would not fit.
    """
    files = weight_files(source)
    if files and not copies(files, dtype):
        yield
        return
    with alone(writable_folder(cache_folder() / "locks") / "loading.lock", f"load {source}", wait=True):
        yield


def weight_files(source: str) -> list[Path]:
    """The safetensors files that `from_pretrained` would read; none where it would read something else.

    Of a hub id those in the cache, which are downloaded if need be. Raises OSError where that fails.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def found(name: str) -> Path | None:
        if Path(source).is_dir():
            path = Path(source) / name
            return path if path.is_file() else None
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
        path = cached_file(source, name, **quietly)
        return None if path is None else Path(path)

    if (whole := found(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := found(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    content = read_json(index)
    parts = sorted(set(content["weight_map"].values())) if isinstance(content, dict) else []
    files = [found(part) for part in parts]
    return [path for path in files if path is not None] if all(files) else []


def copies(files: list[Path], dtype: torch.dtype) -> bool:
    """Whether weights that are loaded in `dtype` are numbers of the process's own, and not pages of the files."""
    sizes = [pair for path in files for pair in _sizes(path)]
    floating = sum(size for written, size in sizes if written in _FLOATING)
    apart = sum(size for written, size in sizes if written in _FLOATING and written != _WRITTEN.get(dtype))
    return apart > _APART * floating


def _sizes(path: Path) -> Iterator[tuple[str, int]]:
    """The dtype and bytes of each tensor, of the file's header: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            yield tensor["dtype"], end - begin


def _described(folder: Path) -> list[Path]:
    """What a model is made by, besides its weights."""
    return sorted(path for path in folder.glob("*.json") if not path.name.endswith(".index.json"))


def _write(folder: Path, model: nn.Module, described: Path, origin: dict[str, str]) -> None:
    # of an earlier attempt, which is not whole
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder, last=_MARKER) as scratch:
        write_model(model, scratch)
        # as they are: what saving has added says nothing of the base
        for path in _described(described):
            shutil.copyfile(path, scratch / path.name)
        write_json(scratch / _MARKER, {"origin": origin, "files": sums_of(scratch, _MARKER)})


def _is_whole(folder: Path, origin: dict[str, str]) -> bool:
    """Whether the weights of these very files are there, complete and unchanged; their marker is written last."""
    try:
        marker = read_json(folder / _MARKER)
        return marker["origin"] == origin and marker["files"] == sums_of(folder, _MARKER, digest_of)
    except (OSError, ValueError, KeyError, TypeError):
        return False
