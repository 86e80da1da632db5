"""Putting LoFiT into a model: new vectors, or those of an adapter folder."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from lofit_fast.config import LofitConfig, shown
from lofit_fast.patching.adapter_sources import adapter_for
from lofit_fast.patching.architectures import find_projections
from lofit_fast.patching.fully_sharded import reshard
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.named_adapters import FIRST
from lofit_fast.patching.one_at_a_time import one_at_a_time
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.peft_layers import is_tuner_layer, saved_names, tuner_layers
from lofit_fast.patching.sharding import check_patchable
from lofit_fast.patching.vector_sync import check_same_vectors


@one_at_a_time
def patch(model: nn.Module, config: LofitConfig, *, name: str = FIRST) -> LofitHandle:
    """Wrap the output projections of the layers that `config` adapts, and freeze everything else.

    model: a Hugging Face model (or a PeftModel around one) with an output projection of a usual name, see `families.py`
    and docs/support.md. Of several towers the language model is adapted, of an encoder and a decoder the decoder's
    self-attention (`find_projections`). All else is frozen, an untrained classifier's head too: set `requires_grad` of
    its parameters afterwards to train it. Undo with `handle.unpatch()`, which makes trainable again what was.
    Vectors with positions="answer" find where answers begin in what each forward is called with, see
    `answer_positions.where_it_acts`; one that does not say it is refused, outside of `handle.acting_on`.
    name: of the adapter, should others be added beside it (`handle.add`).
    A model that was given to FSDP2's fully_shard is patched as it is, in every process with the same config: each holds
    the vectors whole, and their gradients are averaged over the processes (`vector_sync`).
    Raises TypeError or ValueError for an unknown model, a model already patched, or sharded by anything else, a layer
    or head out of range. A refused model is as it was.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"expected the name of an adapter, got {shown(name)}")
    _check_unpatched(model)
    if not isinstance(config, LofitConfig):
        raise TypeError(f"expected a LofitConfig, got {type(config).__name__}")
    check_patchable(model)
    check_same_vectors(model, config)
    if config.positions != "all" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "expected positions='all' for a model with an encoder: the prompt is there, and all that its decoder reads "
            "is the answer"
        )
    projections = find_projections(model)
    # what was gathered would be frozen in place of the parts
    reshard(model)
    handle = LofitHandle(model, config, projections, name)
    around_peft = any(is_tuner_layer(layer.inner) for layer in handle.layers.values())
    before = saved_names(model) if around_peft else {}
    trained = any(p.requires_grad for _, _, layer in tuner_layers(model) for p in layer.parameters())
    handle.attach()
    if around_peft and saved_names(model) != before:
        handle.unpatch()
        raise ValueError(
            "cannot patch: there are adapters of PEFT on the output projections, and PEFT would no longer save them "
            "whole. Merge them first, or let PEFT adapt other modules"
        )
    if trained:
        warnings.warn(
            "patching has frozen PEFT's adapters too: model.set_adapter(name) makes them trainable again",
            stacklevel=3,
        )
    return handle


def load(
    model: nn.Module, folder: Path | str, *, strict: bool = False, name: str = FIRST, revision: str | None = None
) -> LofitHandle:
    """Patch a model with an adapter folder. name: as of `patch`.

    folder: a folder, or a hub id, `user/name`, where there is no folder of that name; revision: a branch, tag or commit
    of the hub. A folder of weights that the paper's code or ITI's has saved is read as the adapter in it.

    An adapter that was trained on a base model with other weights is loaded with a warning that names both; with
    strict=True it is refused. Nothing is said where that cannot be told: of quantized or offloaded weights, and of
    folders of earlier releases.

    Raises FileNotFoundError or ValueError for a folder that is no whole adapter, or one made for a model of another
    shape (both shapes are named), and OSError for files that cannot be read, or a hub that cannot be asked. A refused
    model is as it was.
    """
    _check_unpatched(model)
    check_patchable(model)
    adapter = adapter_for(model, folder, revision, strict)
    handle = patch(model, adapter.config, name=name)
    try:
        handle.take(adapter)
    except BaseException:
        handle.unpatch()
        raise
    return handle


def _check_unpatched(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model to patch, got {type(model).__name__}")
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() or merge() its handle first (lofit_fast.handle_of)")
