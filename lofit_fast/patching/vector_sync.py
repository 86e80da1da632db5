"""One mean of gradients over the processes of a model that FSDP2 shards, for vectors that FSDP knows nothing of.

These are the vectors of a model that was sharded before it was patched, of layers that nobody sharded, and those that
fully_shard was told to ignore. Each process has them whole. When a backward pass ends, one message sums their
gradients over the processes, as FSDP does with the parameters that it shards. Where gradients are accumulated, every
pass sends all of them again; those of earlier passes are the same everywhere by then, and their mean changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lofit_fast import ranks
from lofit_fast.patching.fully_sharded import divisor_of, held, mesh_of, shards
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.layer_vectors import named_vectors
from lofit_fast.patching.sharding import is_shared


class VectorSync:
    """Listens, until `remove`, for the gradients of vectors that are in no group of FSDP's.

    model: its parts that were given to fully_shard are found, whenever that was. decoder: before each of its forwards
    the vectors are looked at again; those that a DistributedDataParallel around the model does not know are refused.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, layers: list[LofitLinear]) -> None:
        self.model, self.layers = model, layers
        self._listening: dict[int, tuple[Tensor, torch.utils.hooks.RemovableHandle]] = {}
        # the backward pass at whose end the mean is taken
        self._pass: int | None = None
        # what was seen last around the model, with the vectors that it knows: ids
        self._known: tuple[int, ...] = ()
        self._hook = decoder.register_forward_pre_hook(self._before_forward)
        self.look()

    def __getstate__(self) -> dict:
        # a copy's vectors have no hooks: it looks again before its first forward
        return {**vars(self), "_listening": {}, "_pass": None, "_known": ()}

    def remove(self) -> None:
        """Listen no more."""
        self._hook.remove()
        for _, hook in self._listening.values():
            hook.remove()
        self._listening.clear()

    def look(self) -> None:
        """Listen to the vectors that need it, which are none in a model that is not sharded."""
        if not any(map(shards, self.model.modules())):
            return
        for vectors in self._own():
            known = self._listening.get(id(vectors))
            if known is None or known[0] is not vectors:
                self._listening[id(vectors)] = (vectors, vectors.register_post_accumulate_grad_hook(self._came))

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # asked first, since a compiler cannot follow the rest
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and ranks.count() > 1:
            self._check_known()
            self.look()

    def _check_known(self) -> None:
        own = [vectors for layer in self.layers for _, vectors in named_vectors(layer)]
        added = (layer.others for layer in self.layers if layer.others is not None)
        self._known = check_seen([*own, *(v for table in added for v in table.parameters(recurse=False))], self._known)

    def _own(self) -> list[Tensor]:
        """The vectors that are trained and that FSDP has no part of, in an order that all processes share."""
        theirs = held(self.model)
        return [
            vectors
            for layer in self.layers
            for path, vectors in named_vectors(layer)
            if _place(layer, path) not in theirs and vectors.requires_grad
        ]

    def _came(self, vectors: Tensor) -> None:
        # the pass before may have ended in an error, before its mean was taken
        if (current := torch._C._current_graph_task_id()) != self._pass:
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._pass = None
        mesh, vectors = mesh_of(self.model), self._own()
        if mesh is None or not vectors:
            return
        dtype = torch.promote_types(vectors[0].dtype, vectors[-1].dtype)
        parts = [v.new_zeros(v.shape) if v.grad is None else v.grad for v in vectors]
        # a process whose examples gave a layer no gradient gets the mean all the same
        there = torch.tensor([float(v.grad is not None) for v in vectors], dtype=dtype, device=parts[0].device)
        flat = torch.cat([*(part.flatten().to(dtype) for part in parts), there])
        sums = flat.to(_device_of(mesh, flat))
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(sums, group=group)
        flat = sums.to(flat.device)
        *means, there = flat.split([*(v.numel() for v in vectors), len(vectors)])
        divisor = divisor_of(self.model) or mesh.size()
        for v, total, somewhere in zip(vectors, means, there.tolist(), strict=True):
            if somewhere:
                mean = (total / divisor).view_as(v).to(v.dtype)
                # the very tensor, which an optimizer or a clipping may hold
                v.grad = mean if v.grad is None else v.grad.copy_(mean)


def check_seen(vectors: Iterable[Tensor], known: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Raise ValueError in the forward of a DistributedDataParallel that does not know all of the trained vectors.

    known: what the last call returned, so that nothing is looked at twice.
    """
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return known
    trained = {id(v) for v in vectors if v.requires_grad}
    if known == (seen := (id(wrapper), *sorted(trained))):
        return known
    left_out = wrapper.parameters_to_ignore
    own = {id(p) for name, p in wrapper.module.named_parameters() if name in left_out}
    if unknown := trained - own - {id(p) for p in wrapper._module_parameters}:
        raise ValueError(
            f"DistributedDataParallel does not know {len(unknown)} of the {len(trained)} vectors, which are newer than "
            "it, and would leave each process with gradients of its own: patch the model first, and wrap it then"
        )
    return seen


def _place(layer: LofitLinear, path: str) -> tuple[int, str]:
    """What FSDP knows a parameter of a layer by: the module that holds it, by its id, and its name there."""
    owner, _, name = path.rpartition(".")
    return id(layer.get_submodule(owner)), name


def _device_of(mesh, flat: Tensor) -> torch.device:
    """Where the mesh's processes can send a tensor from."""
    if flat.device.type == mesh.device_type:
        return flat.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def check_same_vectors(model: nn.Module, config: object) -> None:
    """Raise ValueError in every process unless all of them patch a sharded model with the same config."""
    if is_shared(model):
        ranks.check_same(config, "LofitConfig")
