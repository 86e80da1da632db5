"""Training where several processes hold the base together, by FSDP2 or tensor parallelism.

The base is sharded first, and then patched. So every process has the vectors whole, as in data parallelism, and one
process writes. Under FSDP2 batches are cut and gradients summed as in data parallelism. None of the engine's ways to
save work is used: they read weights before their layer's turn, or let some processes skip a layer that others run.
Under tensor parallelism each process computes with whole batches, and what reads or makes weights is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lofit_fast import launchers, ranks
from lofit_fast.models.base_digest import base_digest
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.fully_sharded import fully_sharded
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.sharding import check_fittable
from lofit_fast.patching.tensor_parallel import is_tensor_parallel
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.objectives import Objective, Preferences

# knob -> what it is where nothing is tried or kept; "auto" of the attention leaves the model's own
_PLAIN = {
    "compile": False,
    "packing": False,
    "prefix_cache_gb": 0.0,
    "prompt_cache_gb": 0.0,
    "narrow": False,
    "frozen_products": "full",
    "large_pages": False,
    "prepack": False,
    "verify": False,
}
# the same for tensor parallelism, under which packing and narrowing work
_CUT = {
    "compile": False,
    "prefix_cache_gb": 0.0,
    "prompt_cache_gb": 0.0,
    "frozen_products": "full",
    "large_pages": False,
    "prepack": False,
    "verify": False,
}
# by these transformers' Trainer knows a tensor-parallel model: it would divide batches, and write no checkpoints
_DISTRIBUTED = {"_tp_size": None, "_is_distributed_loading_by_transformers": False}


@contextmanager
def sharded_as_asked(model: nn.Module) -> Iterator[None]:
    """A scope in which the base is sharded as accelerate's configuration asks, and no trainer shards it again.

    Each decoder layer is a group, and what is outside of them is another. How they are gathered, offloaded and rounded
    is what the configuration says. The model stays sharded.
    Raises ValueError for FSDP of version 1, a tensor-parallel base, and for what is not done here.
    """
    if launchers.fsdp_asked() and is_tensor_parallel(model):
        raise ValueError(
            "accelerate is configured for FSDP, but the model is tensor-parallel already: expected one of the two. "
            "Start it with torchrun, or with a configuration without FSDP"
        )
    if not launchers.fsdp_asked() or ranks.count() == 1:
        yield
        return
    if not fully_sharded(model):
        _shard(model)
    with launchers.without_fsdp():
        yield


def without_shortcuts(model: nn.Module, engine: Engine) -> Engine:
    """The engine for a model that several processes hold together; any other model's as it is.

    Under FSDP2 nothing is tried, kept or compiled; under tensor parallelism nothing is kept, compiled or quantized.

    Raises ValueError for a knob that was asked for.
    """
    if fully_sharded(model):
        return engine.with_plain(_PLAIN, "the model is sharded (FSDP2)")
    return engine.with_plain(_CUT, "the model is tensor-parallel") if is_tensor_parallel(model) else engine


def check_together(attachment: Attachment) -> None:
    """Raise ValueError for a tensor-parallel model that not all processes of the run hold, and for peers in one."""
    check_fittable(attachment.model)
    if not isinstance(attachment, LofitHandle):
        raise ValueError(
            f"cannot train a {type(attachment).__name__} in a tensor-parallel model, where each process has some "
            "of the heads: only LoFiT's vectors are known to be put together there. Use a model that each process "
            "holds whole"
        )


@contextmanager
def taken_for_whole(model: nn.Module) -> Iterator[None]:
    """A scope in which a Trainer takes a tensor-parallel model for one that a process has by itself.

    The Trainer then gives every process all rows of every batch, wraps nothing, and writes checkpoints. That is right,
    since every process has the vectors whole. The layers of the model do not read these marks.
    """
    own = [module for module in model.modules() if _DISTRIBUTED.keys() & vars(module).keys()]
    before = [{name: vars(module)[name] for name in _DISTRIBUTED if name in vars(module)} for module in own]
    for module in own:
        vars(module).update(_DISTRIBUTED)
    try:
        yield
    finally:
        for module, had in zip(own, before, strict=True):
            for name in _DISTRIBUTED:
                vars(module).pop(name)
            vars(module).update(had)


def check_objective(model: nn.Module, objective: Objective) -> None:
    """Raise ValueError for preferences and a model that FSDP2 shards: TRL's trainer looks at whole weights."""
    if fully_sharded(model) and isinstance(objective, Preferences):
        raise ValueError(
            "cannot train on preferences: the model is sharded (FSDP2), and TRL's trainer looks at whole weights. "
            "Train data-parallel, each process with the whole model"
        )


def _shard(model: nn.Module) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # reads the variables that accelerate's launcher sets
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate is configured for FSDP of version {plugin.fsdp_version}: expected fsdp_version: 2 in its file"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing is not applied here: expected false in accelerate's file; "
            "model.gradient_checkpointing_enable() does the same"
        )
    if plugin.cpu_ram_efficient_loading:
        # transformers has loaded the numbers in the first process alone
        ranks.as_first([*model.parameters(), *model.buffers()])
    # parts of several models would make one that nobody has loaded
    ranks.check_same(base_digest(model), "model")
    if (precision := launchers.precision_asked()) is not None:
        plugin.set_mixed_precision(precision)
    how = {
        "mesh": torch.distributed.init_device_mesh(device_of(model).type, (ranks.count(),)),
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **how)
    fully_shard(model, **how)
