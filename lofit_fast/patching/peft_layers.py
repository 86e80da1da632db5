"""What PEFT has put into a model beside LoFiT: found, asked whether it is switched off, kept savable.

Nothing here imports PEFT: where it is not loaded, no model has a layer of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from lofit_fast.patching.cache_names import given_cache

# what a wrapper of ours calls the module that it holds
INNER = "inner"
# the adapter in which TRL keeps the policy as it was, by copying "default"
REFERENCE = "ref"
UNSEEN = (
    "PEFT has entered or left the model, or changed its adapters, since LoFiT saw its last forward, and a graph of the "
    "whole model would go on with what was seen then: run one forward before torch.compile, or without fullgraph=True"
)


class NameBelow(str):
    """The name of a module below a wrapper, "o_proj.inner.lora_A", that reads "o_proj.lora_A" in an f-string.

    A wrapper's state dict leaves its own level out. PEFT finds the tensors of its layers there by names of modules with
    something appended, f"{name}.lora_A": they must be the state dict's. As a path the name is the module's.
    """

    def __new__(cls, name: str, wrapper: str) -> NameBelow:
        """name: the module's path. wrapper: the path of the wrapper above it."""
        made = super().__new__(cls, name)
        made.key = wrapper + name[len(wrapper) + 1 + len(INNER) :]
        return made

    def __format__(self, spec: str) -> str:
        return format(self.key.removeprefix("."), spec)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT: LoRA's, IA3's, anybody's."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    kind = getattr(loaded, "BaseTunerLayer", None)
    return kind is not None and isinstance(module, kind)


def tuner_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, layer) of every layer of PEFT in the model."""
    if "peft.tuners.tuners_utils" in sys.modules:
        for parent in model.modules():
            for name, child in parent._modules.items():
                if is_tuner_layer(child):
                    yield parent, name, child


def saved_names(model: nn.Module) -> dict[str, set[str]]:
    """The names under which PEFT would save each of the model's adapters; empty for a model that holds no config."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    from peft import get_peft_model_state_dict

    return {
        # without a look at the base model's embeddings, which PEFT fetches from the hub
        adapter: set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
        for adapter in configs
    }


class PeftWatch:
    """Looks, before each forward of a patched model, what PEFT has done to it since.

    PEFT switches its layers off inside `disable_adapter()`: one of them is shown to ours, which then computes the base
    too. PEFT freezes everything but its own when it enters a model, our vectors too: a training step with them frozen
    is refused, since an optimizer has left them out in silence.

    decoder: whose forward is watched. ancestors: the modules from the model's top to the decoder, of which PEFT marks
    one as its base. layers: ours. parameters: our vectors.
    """

    def __init__(
        self, decoder: nn.Module, ancestors: Iterable[nn.Module], layers: Iterable[nn.Module], parameters: list
    ) -> None:
        self.decoder, self.ancestors = decoder, list(ancestors)
        self.layers, self.parameters = list(layers), parameters
        # set where the owner has said which of the two is wanted, and PEFT's freezing no longer surprises
        self.told = False
        self._place: tuple[nn.Module, str, nn.Module] | None = None
        self._configs: list[object] = []
        self._look(thoroughly=True)
        self._at_first = self.witness
        self._hook = decoder.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)

    @property
    def witness(self) -> nn.Module | None:
        """A layer of PEFT in the model, which is switched off when all are."""
        return None if self._place is None else self._place[2]

    def entered_since(self) -> bool:
        """Whether PEFT's layers are in the model that were not there when it was patched."""
        self._look(thoroughly=True)
        return self.witness is not None and self.witness is not self._at_first

    def look(self) -> None:
        """Find out whether PEFT's layers are there, and switched off, before a forward asks ours."""
        self._look(thoroughly=False)

    def remove(self) -> None:
        """Stop looking."""
        self._hook.remove()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # a replica of data parallelism shares this hook
        if module is not self.decoder:
            return
        training = module.training and torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self._look(thoroughly=training)
        elif self._is_unseen():
            # a graph holds what was seen before it was compiled. It ends here, and this is run as it is
            raise ValueError(UNSEEN)
        self._refuse_moving_reference()
        if training and not self.told and not any(p.requires_grad for p in self.parameters):
            self._refuse_frozen(kwargs)

    def _is_unseen(self) -> bool:
        """Whether PEFT has marked, or left, a module since the last look. For compilers too: names and nothing else."""
        seen, place = self._configs, self._place
        if place is not None and place[0]._modules.get(place[1]) is not place[2]:
            return True
        for number, module in enumerate(self.ancestors):
            found = module.__dict__.get("peft_config")
            if found is not (seen[number] if seen else None):
                return True
        return False

    def _refuse_moving_reference(self) -> None:
        if REFERENCE not in getattr(self.witness, "active_adapters", ()):
            return
        if any(layer.active for layer in self.layers) and any(p.requires_grad for p in self.parameters):
            raise ValueError(
                f"PEFT's adapter {REFERENCE!r} is active, with which TRL computes its reference, and LoFiT's vectors "
                "are trained: the reference would change with them. Give the trainer a ref_model of its own, or run "
                "the reference inside handle.disabled()"
            )

    def _refuse_frozen(self, kwargs: dict) -> None:
        # prompts that are learned have no layers in the model, and enter with a graph
        learned = "peft" in sys.modules and any(t.requires_grad for t in _prompts(kwargs))
        if learned or (self.witness is not None and self.witness is not self._at_first):
            raise ValueError(
                "PEFT has frozen LoFiT's vectors: it entered the model after lofit_fast.patch, and freezes all but its "
                "own. To train both, call handle.requires_grad_(True) before the optimizer is made, or patch after "
                "get_peft_model. To train PEFT's adapter alone, call handle.requires_grad_(False)"
            )

    def _look(self, thoroughly: bool) -> None:
        """Find a layer of PEFT, if there is one. All modules are asked only where something points to a change."""
        if "peft.tuners.tuners_utils" not in sys.modules:
            return
        if thoroughly or not self._configs or self._is_unseen():
            self._place = next(tuner_layers(self.ancestors[0]), None)
            self._configs = [vars(module).get("peft_config") for module in self.ancestors]
            for layer in self.layers:
                # in a tuple, lest it become a child
                layer.peft = () if self._place is None else (self._place[2],)
        if thoroughly:
            self._name_projections(self._configs)

    def _name_projections(self, configs: list[object]) -> None:
        """In the target modules of PEFT's configs, what a wrapper holds takes the projection's own name.

        "all-linear" finds it under ours; a model without LoFiT has no such name, and would leave its adapter out.
        """
        for owner, found in zip(self.ancestors, configs, strict=True):
            for config in found.values() if isinstance(found, dict) else ():
                targets = getattr(config, "target_modules", None)
                if not isinstance(targets, set | list) or all(t.split(".")[-1] != INNER for t in targets):
                    continue
                wrappers = {id(layer) for layer in self.layers if is_tuner_layer(layer.inner)}
                ours = [name for name, module in owner.named_modules() if id(module) in wrappers]
                config.target_modules = type(targets)([*(t for t in targets if t.split(".")[-1] != INNER), *ours])


def _prompts(kwargs: dict) -> Iterator[torch.Tensor]:
    """What a decoder is given in the place of token ids, or as if it had read them already."""
    cached = getattr(given_cache(kwargs), "layers", ())
    for tensor in (kwargs.get("inputs_embeds"), *(getattr(layer, "keys", None) for layer in cached[:1])):
        if isinstance(tensor, torch.Tensor):
            yield tensor
