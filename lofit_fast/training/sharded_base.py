"""Training where FSDP2 shards the base over the processes: the base is sharded first, and then patched.

So every process has the vectors whole, as in data parallelism: batches are cut and gradients put together as there, and
one process writes. What the engine has to save work looks at weights outside of their layer's turn, or lets some
processes pass a layer that others do not: none of it is used.
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
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine import Engine
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
    "verify": False,
}


@contextmanager
def sharded_as_asked(model: nn.Module) -> Iterator[None]:
    """A scope in which trainers hear nothing of accelerate's FSDP: where it is asked for the base is sharded here.

    Each decoder layer is a group, and what is outside of them another; how they are gathered, offloaded and rounded is
    what accelerate's configuration says. The model stays sharded.
    Raises ValueError for FSDP of version 1, and for what is not done here.
    """
    if not launchers.fsdp_asked() or ranks.count() == 1:
        yield
        return
    if not fully_sharded(model):
        _shard(model)
    with launchers.without_fsdp():
        yield


def without_shortcuts(model: nn.Module, engine: Engine) -> Engine:
    """The engine for a model that FSDP2 shards: nothing is tried, kept or compiled. Any other model's as it is.

    Raises ValueError for a knob that was asked for.
    """
    if not fully_sharded(model):
        return engine
    return engine.with_plain(_PLAIN, "the model is sharded (FSDP2)")


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
