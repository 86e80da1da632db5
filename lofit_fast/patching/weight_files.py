"""Tensors of a saved model, by name, one at a time: safetensors files, or `.bin` files that hold tensors alone.

A `.bin` file is a pickle. torch opens it with `weights_only=True`, which knows tensors and plain containers; one that
holds anything else is refused and not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from safetensors import safe_open
from torch import Tensor

from lofit_fast.config import shown
from lofit_fast.files import read_json

_SUFFIXES = (".safetensors", ".bin")
# what transformers calls the weights of a folder, the first that is there: a list of files, or one file
_IN_A_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class SavedTensors(Mapping[str, Tensor]):
    """Tensors by name. Of safetensors files only the ones that are asked for are read."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        if path.suffix == ".safetensors":
            with _damage_of(path), safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        if path not in self._pickled:
            self._pickled[path] = _unpickled(path)
        if name not in self._pickled[path]:
            raise ValueError(f"{path} lacks the tensor {shown(name)} that its index names")
        return self._pickled[path][name]


def has_weights(path: Path) -> bool:
    """Whether a path is a file of weights, or a folder with one of the names that transformers gives them."""
    if path.is_dir():
        return any((path / name).is_file() for name in _IN_A_FOLDER)
    return path.suffix in _SUFFIXES and path.is_file()


def saved_tensors(path: Path) -> SavedTensors:
    """The tensors of a folder that `save_pretrained` or a Trainer has written, or of one file of weights.

    Raises FileNotFoundError for no weights or a part that is missing, ValueError for files that are damaged, or pickles
    of something else than tensors.
    """
    if path.is_dir():
        path = next((path / name for name in _IN_A_FOLDER if (path / name).is_file()), path)
    if path.name.endswith(".index.json"):
        return SavedTensors(_indexed(path))
    if not path.is_file() or path.suffix not in _SUFFIXES:
        raise FileNotFoundError(f"{path} holds no weights: expected one of {', '.join(_IN_A_FOLDER)}")
    return SavedTensors(dict.fromkeys(_names_in(path), path))


def _names_in(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickled(path))
    with _damage_of(path), safe_open(path, framework="pt") as file:
        return list(file.keys())


def _indexed(index: Path) -> dict[str, Path]:
    """The file of each tensor, by an index of several files beside it."""
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is no index of weights: expected a weight_map, got {shown(content)}")
    for file in {str(file): file for file in listed.values()}.values():
        plain = isinstance(file, str) and PurePath(file).name == file and file.endswith(_SUFFIXES)
        if not plain:
            raise ValueError(f"{index} names the file {shown(file)}: expected a file of weights beside it")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent} is not whole: {file} is missing")
    return {name: index.parent / file for name, file in listed.items()}


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """A dict of tensors in a `.bin` file. Raises ValueError for anything else, which is not run."""
    with _damage_of(path):
        try:
            # the numbers stay in the file until they are asked for
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # torch's format before 1.6 is no zip file
            if "mmap" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} holds no tensors by name: expected the state dict of a model, got {shown(found)}")
    return found


# the first words of torch's refusal -> what is said instead of its advice to switch the check off
_CODE = "it is a pickle of more than tensors, which could run code, so it is not opened: save it again as safetensors"


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """A scope in which what is wrong with a file of weights is a ValueError that names it."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    # the libraries have errors of their own
    except Exception as error:
        said = _CODE if "weights_only" in str(error).lower() or "weights only" in str(error).lower() else None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read: {said or first}") from error
