"""A whole copy of a model that FSDP2 shards, in files of the first process, for what needs all of a model at once.

The tensors are gathered one after the other, and each goes from the first process's memory to a file that stands for
the memory of the copy: no process ever holds more than one of them whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lofit_fast import ranks
from lofit_fast.files import file_errors, whole_folder
from lofit_fast.patching.fully_sharded import reshard, unsharded_class, whole
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patch import patch
from lofit_fast.patching.stock import Stock
from lofit_fast.patching.storage import Adapter, fill

Value = TypeVar("Value")


@torch.no_grad()
def with_whole_copy(handle: LofitHandle, folder: Path | str, do: Callable[[LofitHandle], Value]) -> Value:
    """What `do` makes of a patched copy of a sharded model, in the first process; told to all, as what it raises is.

    All processes must call it. The copy is on the CPU, and takes the size of the model on the disk, in `folder`, for as
    long as `do` works. Its numbers are the model's own: those that FSDP trains, not those that it computes with.
    Raises ValueError for a model that stock code does not build, OSError where there is no room for it.
    """
    model = handle.model
    _check_stock(model)
    # whoever is gone meanwhile is named
    with ranks.joined("gathering the model"), ExitStack() as stack:
        adapter = handle.adapter()
        reshard(model)
        state = model.state_dict()
        files: dict[str, Tensor] = {}
        ranks.told(lambda: files.update(_made(state, Path(folder), stack)))
        for name, tensor in state.items():
            numbers = whole(tensor)
            if ranks.first():
                files[name].copy_(numbers)
        return ranks.told(lambda: do(_patched(model, files, adapter)))


def _check_stock(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    name = unsharded_class(model).__name__
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"cannot export a {name} with other adapters around it: merge or unload them first")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"cannot export a sharded {name} of quantized weights: load the base unquantized")


def _made(state: Mapping[str, Tensor], folder: Path, stack: ExitStack) -> dict[str, Tensor]:
    """An empty tensor in a file for each of a model's. Raises OSError before any is filled, where they do not fit."""
    scratch = stack.enter_context(whole_folder(folder))
    place = scratch / "whole"
    # before the scratch folder's own files are moved
    stack.callback(shutil.rmtree, place, ignore_errors=True)
    with file_errors(folder):
        place.mkdir()
        return {name: _in_file(place / str(number), tensor) for number, (name, tensor) in enumerate(state.items())}


def _in_file(path: Path, like: Tensor) -> Tensor:
    size = like.numel() * like.element_size()
    if size == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    with path.open("wb") as file:
        # what a full disk does to memory that stands for a file is no error but the end of the process
        os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


def _patched(model: nn.Module, state: Mapping[str, Tensor], adapter: Adapter) -> LofitHandle:
    """The copy, patched. Buffers that no folder holds are the model's own numbers."""
    copied = Stock(model.config, unsharded_class(model)).build()
    copied.load_state_dict(dict(state), assign=True)
    copied.tie_weights()
    buffers = dict(model.named_buffers())
    for name, _ in list(copied.named_buffers()):
        if name not in state:
            path, _, own = name.rpartition(".")
            copied.get_submodule(path).register_buffer(own, buffers[name].cpu().clone(), persistent=False)
    for name in ("generation_config", "_weight_conversions"):
        if hasattr(model, name):
            setattr(copied, name, getattr(model, name))
    copied.train(model.training)
    handle = patch(copied, adapter.config)
    fill(handle.vectors(), adapter)
    return handle
