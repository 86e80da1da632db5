"""FSDP2, torch's `fully_shard`: what of a model it holds in parts, and whole tensors from parts.

A vector of a model that was patched first is one more parameter of its layer's group: FSDP gathers it, and divides its
gradient. Vectors put into a model that is sharded already are no parameters of any group: each process has them whole,
and `vector_sync` averages their gradients.
All that gathers must be called in every process of the mesh, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lofit_fast.patching.placement import computed_on

# what fully_shard leaves on every module whose parameters it looked at
MARK = "_is_fsdp_managed_module"
# torch's placement of several slices of a dimension, as of two weights in one of which each process has a part
_IN_PIECES = "_StridedShard"


def shards(module: nn.Module) -> bool:
    """Whether a module was given to fully_shard."""
    return _of_fsdp(type(module))


def fully_sharded(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that were given to fully_shard."""
    return [module for module in model.modules() if shards(module)]


def is_marked(module: nn.Module) -> bool:
    """Whether fully_shard has looked at a module's own parameters, and may bring and free them."""
    return MARK in vars(module)


def sharded_from_outside(model: nn.Module) -> str | None:
    """The name of a module that a module around the model shards; None where there is none."""
    inside: set[int] = set()
    for module in fully_sharded(model):
        inside |= {id(part) for part in module.modules()}
    outside = (name for name, module in model.named_modules() if is_marked(module) and id(module) not in inside)
    return next((name or "the model" for name in outside), None)


def held(model: nn.Module) -> dict[tuple[int, str], Any]:
    """FSDP's record of every parameter that it holds in parts, by (id of the module, name of the parameter)."""
    records = {}
    for record in _records(model):
        info = record._module_info
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        for module, name in ((info.module, info.param_name), *shared):
            records[id(module), name] = record
    return records


def in_parts(model: nn.Module) -> set[int]:
    """Ids of the parameters that FSDP holds in parts, as the model has them while nothing is gathered."""
    return {id(record.sharded_param) for record in _records(model) if not record.is_dtensor}


def mesh_of(model: nn.Module) -> Any:
    """The mesh of processes that share the model's parameters. None where fully_shard was given none of them.

    Raises ValueError for several meshes, as of experts: whose gradients are to be averaged over which is not known.
    """
    meshes = []
    for record in _records(model):
        mesh = record.sharded_param.device_mesh
        if mesh not in meshes:
            meshes.append(mesh)
    if len(meshes) > 1:
        raise ValueError(
            f"cannot patch a model that is sharded over {len(meshes)} meshes of processes ({meshes[0]}, {meshes[1]}): "
            "expected one for all of its parameters. Patch the model first and shard it afterwards"
        )
    return meshes[0] if meshes else None


def divisor_of(model: nn.Module) -> float | None:
    """What FSDP divides sums of gradients by, where it was told so; None for the number of processes."""
    for module in fully_sharded(model):
        for group in _groups(module):
            if (factor := getattr(group, "gradient_divide_factor", None)) is not None:
                return factor
    return None


def reshard(model: nn.Module) -> None:
    """Leave every module with its parts: between a forward and the next, some show what was gathered for it."""
    for module in fully_sharded(model):
        module.reshard()


def is_placed(tensor: object) -> bool:
    """Whether a tensor is one of several processes (a DTensor), which knows where its parts are."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All numbers of a tensor that is in parts, where it is computed with; any other tensor as it is. Detached."""
    tensor = tensor.detach()
    if not is_placed(tensor):
        return tensor
    # one that waits on the CPU is sent from the device that the processes talk through
    return tensor.to(computed_on(tensor)).full_tensor()


@torch.no_grad()
def put(numbers: Tensor, into: Tensor) -> None:
    """Copy a whole tensor, the same in every process, into one that may be in parts. Nothing is sent."""
    if not is_placed(into):
        into.copy_(numbers)
        return
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(numbers.to(computed_on(into)), into.device_mesh, into.placements, src_data_rank=None)
    into.to_local().copy_(placed.to_local())


def unsharded_class(module: nn.Module) -> type:
    """The class that a module had before fully_shard."""
    return next(kind for kind in type(module).__mro__ if not _of_fsdp(kind))


# asked of every module, again and again
@cache
def _of_fsdp(kind: type) -> bool:
    """Whether a class is one that fully_shard makes: a new one, of which FSDPModule is a base."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def _records(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in fully_sharded(model):
        for group in _groups(module):
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def _groups(module: nn.Module) -> list[Any]:
    state = module._get_fsdp_state()
    # one in older releases of torch
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None]


def is_spread(tensor: Tensor) -> bool:
    """Whether the parts of a tensor are slices of it along one dimension, in one piece or several, or copies of it."""
    if not is_placed(tensor):
        return False
    # of two cuts, as beside tensor parallelism, the second need not be of whole slices
    cuts = [place for place in tensor.placements if not place.is_replicate()]
    return len(cuts) < 2 and all(type(place).__name__ in ("Shard", _IN_PIECES) for place in cuts)


def _own_places(tensor: Tensor) -> tuple[int, Tensor] | None:
    """(the dimension along which a tensor is cut, this process's places along it, in order); None for a copy."""
    found = [(n, place) for n, place in enumerate(tensor.placements) if not place.is_replicate()]
    if not found:
        return None
    number, place = found[0]
    dim = place.dim % tensor.dim()
    if type(place).__name__ == _IN_PIECES:
        from torch.distributed.tensor import distribute_tensor

        # a row of numbers, cut as the dimension is
        along = type(place)(0, split_factor=place.split_factor)
        row = torch.arange(tensor.shape[dim], device=computed_on(tensor))
        laid = [along if n == number else other for n, other in enumerate(tensor.placements)]
        return dim, distribute_tensor(row, tensor.device_mesh, laid, src_data_rank=None).to_local()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return dim, torch.arange(offset[dim], offset[dim] + shape[dim], device=computed_on(tensor))


Places = Callable[[Tensor], tuple[Tensor, Tensor] | None]


@torch.no_grad()
def spread_sample(tensor: Tensor, places: Places) -> Tensor:
    """(n,) numbers of a tensor whose parts are slices, see `is_spread`, in every process; only these are sent.

    places: (rows, columns) of the numbers, in the tensor's matrix of as many columns as it has; None for all of them.
    """
    found = places(tensor)
    if found is None:
        return whole(tensor).reshape(-1)
    rows, columns = (place.to(computed_on(tensor)) for place in found)
    at = [*(torch.unravel_index(rows, tensor.shape[:-1]) if tensor.dim() > 1 else ()), columns]
    mine = torch.ones_like(rows, dtype=torch.bool)
    if (cut := _own_places(tensor)) is not None:
        dim, own = cut
        local = torch.full((tensor.shape[dim],), -1, device=own.device)
        local[own] = torch.arange(len(own), device=own.device)
        at[dim] = local[at[dim]]
        mine = at[dim] >= 0
    # as whole numbers: zeros beside them change no bit, that of a negative zero neither
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    sample = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    numbers = tensor.to_local().to(computed_on(tensor))
    sample[mine] = numbers[tuple(place[mine] for place in at)].view(kind).to(torch.int64)
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(sample, group=tensor.device_mesh.get_group(dim))
    return sample.to(kind).view(tensor.dtype)
