"""Where an adapter comes from: a folder of ours, the hub, or a checkpoint of somebody else's code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from lofit_fast import ranks
from lofit_fast.patching.architectures import Fingerprint, Projection, find_projections, fingerprint
from lofit_fast.patching.hub_adapters import adapter_folder
from lofit_fast.patching.published_checkpoints import is_published, read_published
from lofit_fast.patching.sharding import is_shared
from lofit_fast.patching.storage import Adapter, check_fits, read_adapter
from lofit_fast.patching.weight_sample import check_base


def adapter_for(model: nn.Module, name: Path | str, revision: str | None, strict: bool) -> Adapter:
    """The adapter of a name, checked to be for this model.

    model: not patched. name, revision: as of `hub_adapters.adapter_folder`; a folder, or a file of weights, may hold a
    checkpoint of another's code, see `published_checkpoints`. strict: whether other base weights are an error rather
    than a warning.
    Raises what these raise, and ValueError for an adapter of a model of another shape.
    """
    projections = find_projections(model)
    shape = fingerprint(model, projections)
    # several processes that share the weights all stop where one cannot read
    with ranks.together("reading the adapter") if is_shared(model) else nullcontext():
        adapter = read_source(adapter_folder(name, revision), model, projections, shape, strict)
    check_fits(adapter, shape)
    check_base(model, adapter.base_digest, f"the adapter in {name}", adapter.base_model, strict)
    return adapter


def read_source(
    folder: Path, model: nn.Module, projections: Sequence[Projection], shape: Fingerprint, strict: bool
) -> Adapter:
    """The adapter in a folder, ours or another's. projections, shape: of the base, as it was before it was patched.

    Raises what `storage.read_adapter` and `published_checkpoints.read_published` raise.
    """
    if is_published(folder):
        if is_shared(model):
            raise ValueError(
                f"{folder} is another code's checkpoint, which is compared with whole weights, and several processes "
                "share this model's: convert it in one process (lofit-fast convert-adapter), and load that folder"
            )
        return read_published(folder, model, projections, shape, strict)
    return read_adapter(folder)
