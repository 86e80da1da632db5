"""The part of a patched model below its lowest tuned layer, and whether it gives the same in every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lofit_fast.data.padding import padded
from lofit_fast.models.base_digest import dropout_of
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.placement import device_of
from lofit_fast.training.prefix_cache.proven_store import Unfit
from lofit_fast.training.prefix_cache.skip_layers import recorded, skipped

# the hidden states of a batch, in a batch
STATES = "prefix_states"


class Prefix:
    """The part of a patched model below its lowest tuned layer."""

    def __init__(self, handle: LofitHandle) -> None:
        self.model = handle.model
        places = {id(layers): path for path, layers in self.model.named_modules()}
        self.layers = _list_of(self.model, decoder_layers(self.model))
        self.decoder = self.model.get_submodule(places[id(self.layers)].rpartition(".")[0])
        self.until = min(handle.layers)
        self.device = device_of(self.model)

    def modules(self) -> Iterator[nn.Module]:
        """Every module of the decoder that the states depend on."""
        above = {id(m) for layer in self.layers[self.until :] for m in layer.modules()}
        return (m for m in self.decoder.modules() if id(m) not in above)

    def run(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """The states (B, S, N) that enter layer `until`, for sequences padded to the longest."""
        ids, mask = (x.to(self.device) for x in padded(batch, 0))
        with recorded(self.layers, self.until) as states:
            self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return states.value

    def skipped(self):
        """A scope in which batches with states skip the prefix."""
        return skipped(self.model, self.layers, self.until, STATES)


def _list_of(model: nn.Module, layers: Sequence[nn.Module]) -> nn.ModuleList:
    """The list in the model that holds just these layers. Raises Unfit where there is none."""
    wanted = list(map(id, layers))
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = next((one for one in lists if list(map(id, one)) == wanted), None)
    if found is None:
        raise Unfit("the decoder's layers are in no list of their own")
    return found


def check_fit(prefix: Prefix) -> None:
    """Refuse, from what can be read off the model, a prefix that is empty or changes."""
    if prefix.until == 0:
        raise Unfit("layer 0 is tuned, so every layer depends on the adapter (--min-layer keeps the lower ones free)")
    for module in prefix.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            raise Unfit("the layers below the lowest tuned one are trained too")
        if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
            raise Unfit("the model is offloaded")
        if reason := dropout_of(module):
            raise Unfit(reason)
