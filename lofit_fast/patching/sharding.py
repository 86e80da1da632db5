"""Sharded models: refused where a part of a tensor would be taken for the whole. Told by kinds of tensors, not tools.

Each process of a sharded model holds parts of its tensors. Head numbers are those of the whole, so that an adapter put
into parts lands on other heads; and vectors that are made after the sharding are known to nobody who synchronises it.
FSDP2 alone is known: it gathers each tensor whole where it is used, and `vector_sync` sees to the vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch.distributed as dist
from torch import Tensor, nn

from lofit_fast import ranks
from lofit_fast.patching.fully_sharded import fully_sharded, in_parts, mesh_of, sharded_from_outside, shards
from lofit_fast.patching.tensor_parallel import is_tensor_parallel, n_holding, why_not_parallel

_BEFORE = (
    "Patch the model first and shard it afterwards (fully_shard), or train data-parallel, each process with the "
    "whole model"
)
_GATHER = (
    "Gather the model first, on every process: module.unshard() of each module that was given to fully_shard, with "
    "module.reshard() afterwards; FullyShardedDataParallel.summon_full_params; deepspeed.zero.GatheredParameters"
)

_EXPORT = (
    "lofit_fast.export, called in every process, writes the merged model as a plain folder and gathers one tensor at a "
    "time for it"
)


_ONE_PROCESS = (
    "Save the adapter (handle.save, on every process), load it into a model that one process holds whole "
    "(lofit_fast.load), and do it there"
)


def check_patchable(model: nn.Module) -> None:
    """Raise ValueError for a model that holds parts of its tensors, before it is patched.

    Not for one of FSDP2, or one that is tensor-parallel in a way that is known.
    """
    found = _flattened(model)
    if found is None and (name := sharded_from_outside(model)) is not None:
        found = f"{name} is sharded as a part of a module around the model"
    if found is None:
        found = why_not_parallel(model) if is_tensor_parallel(model) else _first_part(model, in_parts(model))
    if found is not None:
        raise ValueError(f"cannot patch a sharded model: {found}. {_BEFORE}")
    # raises for several
    mesh_of(model)


def check_fittable(model: nn.Module) -> None:
    """Raise ValueError for a model that `fit` cannot train: what cannot be patched, and a tensor-parallel one that not
    all processes of the run hold together."""
    check_patchable(model)
    here = ranks.count()
    if is_tensor_parallel(model) and (over := n_holding(model)) != {here}:
        held = " and ".join(map(str, sorted(over)))
        raise ValueError(
            f"cannot fit this tensor-parallel model: it is cut over {held} processes, and the run has {here}. Data "
            "parallelism beside tensor parallelism is not done: expected one model that all processes of the run hold "
            "together"
        )


def is_shared(model: nn.Module) -> bool:
    """Whether several processes hold a model's weights together, in a way that is known here."""
    return bool(fully_sharded(model)) or is_tensor_parallel(model)


def gathers_weights(model: nn.Module) -> bool:
    """Whether FSDP, of either generation, keeps the weights apart and gathers them for each forward."""
    return bool(fully_sharded(model)) or _flattened(model) is not None


def check_unshared(model: nn.Module, action: str) -> None:
    """Raise ValueError for a model that several processes hold together, gathered or not. action: what is refused."""
    # parts are of processes that talk to each other
    if not (dist.is_available() and dist.is_initialized()):
        return
    if (found := _first_part(model) or _gathered(model)) is not None:
        raise ValueError(f"cannot {action} a sharded model: {found}. Use a model that this process holds whole")


def check_no_merge(model: nn.Module) -> None:
    """Raise ValueError for a sharded model: its projections would need biases that no part of it was made for."""
    found = _first_part(model) or _gathered(model)
    if found is not None:
        raise ValueError(f"cannot merge a sharded model: {found}. {_instead(model)}")


def check_whole(model: nn.Module, action: str) -> None:
    """Raise ValueError when a patched model, sharded since, holds parts of its tensors. action: what they are for."""
    if (found := _first_part(model)) is not None:
        raise ValueError(f"cannot {action} a sharded model: {found}. {_instead(model)}")


def _instead(model: nn.Module) -> str:
    """What to do where a model must be whole."""
    if is_tensor_parallel(model):
        return _ONE_PROCESS
    return _EXPORT if fully_sharded(model) else _GATHER


def check_whole_vectors(vectors: Iterable[tuple[str, Tensor | None, tuple[int, int]]], action: str) -> None:
    """Raise ValueError unless the vectors of an adapter are whole.

    vectors: (name, tensor, the shape it was made with) each. action: what they are for.
    """
    for name, tensor, shape in vectors:
        found = "which is not there" if tensor is None else kind_of_part(tensor)
        if found is None and (tuple(tensor.shape) != shape or tensor.untyped_storage().nbytes() == 0):
            found = f"which has the shape {tuple(tensor.shape)}, expected {shape} with all its numbers here"
        if found is not None:
            raise ValueError(f"cannot {action} the adapter of a sharded model: found {name}, {found}. {_GATHER}")


def _first_part(model: nn.Module, known: Collection[int] = ()) -> str | None:
    """What shows that a model is sharded, in words; None for a whole one. known: ids of parts that do not count."""
    if (size := getattr(model, "_tp_size", None)) is not None and size > 1:
        return f"it is tensor-parallel over {size} processes"
    return _flattened(model) or next((f"found {name}, {kind}" for name, kind in _parts(model, known)), None)


def _flattened(model: nn.Module) -> str | None:
    """Which module the first FSDP is around, in words."""
    for name, module in model.named_modules():
        # it keeps what it wraps under this name, and its parts in one flat tensor that the parameters point into
        if "_fsdp_wrapped_module" in module._modules:
            return f"found a {type(module).__name__} around {name or 'the model'}"
    return None


def _gathered(model: nn.Module) -> str | None:
    """Which module was given to fully_shard, in words: its tensors look whole between a forward and the next step."""
    for name, module in model.named_modules():
        if shards(module):
            return f"{name or 'the model'} was given to fully_shard"
    return None


def _parts(model: nn.Module, known: Collection[int]) -> Iterator[tuple[str, str]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in known and (kind := kind_of_part(tensor)) is not None:
            yield name, kind
    for name, module in model.named_modules():
        expected = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        weight = vars(module).get("_parameters", {}).get("weight") if type(module) is nn.Linear else None
        if type(weight) is nn.Parameter and tuple(weight.shape) != expected:
            yield f"{name}.weight", f"which has the shape {tuple(weight.shape)} here, expected {expected}"


def kind_of_part(tensor: Tensor) -> str | None:
    """What kind of part a tensor is, in words; None for a whole one."""
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        places = tuple(map(str, tensor.placements))
        return f"a {type(tensor).__name__} placed {places} over {tensor.device_mesh.size()} processes"
    if hasattr(tensor, "local_shards"):
        return f"a {type(tensor).__name__} of which this process holds shards"
    if getattr(tensor, "_is_flat_param", False):
        return "a flat tensor of which this process holds a shard"
    # DeepSpeed's mark on a parameter whose numbers are spread over the processes
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        return "a parameter that is partitioned (ZeRO stage 3)"
    return None
