"""What a handle hooks into its model: put there together, taken away together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lofit_fast.patching.answer_positions import AnswerWatch, language_model
from lofit_fast.patching.architectures import Projection
from lofit_fast.patching.bypass import BypassWatch
from lofit_fast.patching.checkpoints import CheckpointWatch
from lofit_fast.patching.fold import ModelFold, ancestors_of, decoder_of
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.load_watch import LoadWatch
from lofit_fast.patching.output_head import keep_head_input_whole
from lofit_fast.patching.peft_layers import PeftWatch
from lofit_fast.patching.vector_sync import VectorSync


class Watches:
    """All that runs around the forwards and loads of a patched model, until `remove`.

    decoder: the part of the model that holds the layers. ancestors: the modules from the model's top to the decoder.
    fold: what computes W v of all layers at once. sync: what averages gradients in a sharded model. peft: what looks
    for PEFT's layers. answers: what finds where answers begin; None for vectors that act everywhere. load: what warns
    where a state_dict is loaded. checkpoints: what keeps scopes for the second run of a layer. bypass: what finds
    attention that does not call ours.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        layers: Mapping[int, LofitLinear],
        parameters: list[nn.Parameter],
    ) -> None:
        """projections: all of the decoder. layers: ours, by number, in the model. parameters: their vectors."""
        held = list(layers.values())
        # the layers share both
        self.scopes, acting = held[0].scopes, held[0].acting
        self.decoder = decoder_of(model, [p.name for p in projections])
        self.ancestors = ancestors_of(model, self.decoder)
        asked = language_model(self.ancestors)
        # hooks of one module are called in this order
        self.fold = ModelFold(self.decoder, held)
        self.sync = VectorSync(model, self.decoder, held)
        self.peft = PeftWatch(self.decoder, self.ancestors, held, parameters)
        self.answers = None if acting is None else AnswerWatch(asked, self.decoder, held, acting, self.peft)
        self.load = LoadWatch(held[0], self.decoder)
        self.checkpoints = CheckpointWatch(asked, self.decoder, self.scopes, acting)
        self.bypass = BypassWatch(self.decoder)
        for projection in projections:
            if (layer := layers.get(projection.layer)) is not None:
                self.bypass.add(layer, projection.parent, projection.name)
        # but for this one, which goes first
        self.scopes.watch(self.decoder)
        self._head = keep_head_input_whole(model)

    def add(self, layer: LofitLinear, projection: Projection) -> None:
        """Watch one more layer, at a projection that had none."""
        for watch in (self.peft, self.answers, self.fold):
            if watch is not None:
                watch.layers = [*watch.layers, layer]
        self.bypass.add(layer, projection.parent, projection.name)
        self.scopes.add(layer.here)

    def remove(self) -> None:
        """Take all hooks away."""
        watches = (self.fold, self.sync, self.peft, self.answers, self.load, self.checkpoints, self.bypass, self.scopes)
        for watch in (*watches, self._head):
            if watch is not None:
                watch.remove()
