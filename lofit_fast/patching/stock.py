"""What stock transformers code builds from a config: which parameters it has, which are tied, and how it gets biases.

Models are built on the meta device here, so that a question costs no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lofit_fast.patching.families import BIAS_FLAGS


@dataclass(frozen=True)
class Stock:
    """A config and the class that transformers loads it with."""

    config: object
    model_class: type

    def build(self) -> nn.Module:
        """The model, on the meta device."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))

    def changed(self, change: Callable[[object], None]) -> Stock:
        """The same with a copy of the config that `change` was called on."""
        config = copy.deepcopy(self.config)
        change(config)
        return Stock(config, self.model_class)


@dataclass(frozen=True)
class Biased:
    """How a config is told to give the output projections a bias.

    flags: attributes of the config, or of its text part where `nested`. stock: with the flags on. added: the names of
    all parameters that the model then has besides.
    """

    flags: tuple[str, ...]
    nested: bool
    stock: Stock
    added: list[str]

    def switch_on(self, config) -> None:
        """Set the flags in another copy of the config."""
        _switch_on(self.flags, self.nested, config)


def stock_part(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(name, module) of the transformers model: the model itself, or what PEFT and others have around; None without."""
    from transformers import PreTrainedModel

    found = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return next(found, None)


def with_biases(stock: Stock, linears: Iterable[str]) -> Biased | None:
    """The flags of `BIAS_FLAGS` that give these linears a bias.

    linears: names of modules that have no bias. Returns None when none known here do it: those with which the code
    differs in anything but biases do not.
    """
    before = shapes(stock.build())
    wanted = {f"{name}.bias" for name in linears}
    for flags in BIAS_FLAGS:
        for nested in (True, False):
            owner = _owner(stock.config, nested)
            if not all(hasattr(owner, flag) for flag in flags) or getattr(owner, flags[0]):
                continue
            flagged = stock.changed(partial(_switch_on, flags, nested))
            if not _is_valid(flagged.config):
                continue
            after = shapes(flagged.build())
            added = sorted(after.keys() - before.keys())
            only_biases = before.items() <= after.items() and all(name.endswith(".bias") for name in added)
            if only_biases and wanted <= set(added):
                return Biased(flags, nested, flagged, added)
    return None


def with_ties_of(stock: Stock, state: Mapping[str, Tensor]) -> Stock:
    """The config under which no two tensors of the state that differ are tied.

    Raises ValueError where the code ties them whatever the config says.
    """
    untied = stock
    for everywhere in (False, True):
        apart = [pair for pair in ties(untied.build()) if not _equal(state, *pair)]
        if not apart:
            return untied
        untied = stock.changed(lambda config, all_of_it=everywhere: untie(config, all_of_it))
    apart = [pair for pair in ties(untied.build()) if not _equal(state, *pair)]
    if apart:
        raise ValueError(
            f"{stock.model_class.__name__} takes {apart[0][0]} and {apart[0][1]} for one tensor, and here they differ: "
            "a folder of it would load as another model"
        )
    return untied


def ties(model: nn.Module) -> list[tuple[str, str]]:
    """(name, name) of the parameters that transformers makes one, by the model's config of this moment."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    return [] if expand is None else list(expand(all_submodels=True).items())


def untie(config, everywhere: bool = True) -> None:
    """Switch tied embeddings off, in the config and its text part, or in all of its parts."""
    parts = (getattr(config, name, None) for name in config.sub_configs) if everywhere else ()
    for part in (config, config.get_text_config(), *parts):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def ties_as_they_are(model: nn.Module) -> bool | None:
    """What the config's word on tied embeddings should be for this model in memory; None where it is right."""
    pairs = [(model.get_parameter_or_buffer(a), model.get_parameter_or_buffer(b)) for a, b in ties(model)]
    if any(a is not b and not (a.shape == b.shape and torch.equal(a, b.to(a.device))) for a, b in pairs):
        return False
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    one = getattr(head, "weight", None) is not None and head.weight is getattr(embeddings, "weight", None)
    return True if one and not pairs and hasattr(model.config, "tie_word_embeddings") else None


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the state, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _switch_on(flags: tuple[str, ...], nested: bool, config) -> None:
    for flag in flags:
        setattr(_owner(config, nested), flag, True)


def _is_valid(config) -> bool:
    """Whether transformers would write the config down."""
    try:
        getattr(config, "validate", lambda: None)()
    # its error is no ValueError, and has changed its place between releases
    except Exception:
        return False
    return True


def _owner(config, nested: bool):
    return config.get_text_config() if nested else config


def _equal(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    a, b = state.get(one), state.get(other)
    # what is not there is not written either
    return a is None or b is None or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
