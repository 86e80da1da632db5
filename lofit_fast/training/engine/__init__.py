"""How a step is run: attention kernel, compiled layers, grouped or packed batches. Speed, never results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch._inductor.config
from torch import nn

from lofit_fast.cpu.attention import register
from lofit_fast.cpu.blocked_products import BlockedProducts
from lofit_fast.cpu.heap import held_in_large_pages
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training.engine.last_layer import narrowed

Choice = bool | Literal["auto"]
BACKEND = "inductor"
# graphs of one code object, which all layers share: with and without input gradient, narrowed, per adapter and mode
_GRAPHS = 64


@dataclass(frozen=True)
class Engine:
    """The knobs of speed. None of them changes a result beyond rounding, except that grouping picks other batches.

    attention: transformers' attn_implementation ("sdpa", "flash_attention_2", ...), our "lofit_grouped", or "auto".
    compile: torch.compile each decoder layer, one graph for all batch lengths; True, False or "auto".
    group_by_length: draw batches of examples of like length, in random order; False shuffles plainly.
    packing: lay a batch's examples end to end in one row instead of padding them, see `packed.collator_of`; True, False
    or "auto".
    prefix_cache_gb: disk for the activations below the lowest tuned layer; 0 keeps none.
    narrow: run the last layer's MLP on the rows whose logits are kept only, see `narrow.narrowed`; False for a model
    whose last layer somebody listens to; True, False or "auto".
    large_pages: on a CPU, hold the heap in large pages between steps, see `heap.held_in_large_pages`; True, False or
    "auto".
    "auto" is settled on the present machine before a run, see `probe.settle`.
    Raises TypeError / ValueError for a value of another kind.
    """

    attention: str = "auto"
    compile: Choice = "auto"
    group_by_length: bool = True
    packing: Choice = "auto"
    prefix_cache_gb: float = 0.0
    narrow: Choice = "auto"
    large_pages: Choice = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.attention, str) or not self.attention:
            raise TypeError(f"expected attention to be 'auto' or the name of an implementation, got {self.attention!r}")
        for name in ("compile", "packing", "narrow", "large_pages"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise TypeError(f"expected {name} to be True, False or 'auto', got {value!r}")
        if not isinstance(self.group_by_length, bool):
            raise TypeError(f"expected group_by_length to be True or False, got {self.group_by_length!r}")
        if not self.prefix_cache_gb >= 0:
            raise ValueError(f"expected prefix_cache_gb >= 0, got {self.prefix_cache_gb}")


@contextmanager
def prepared(model: nn.Module, engine: Engine) -> Iterator[None]:
    """A scope in which the model runs as `engine` says; afterwards everything is as it was.

    model: the one that is called with the batches. "auto" leaves attention, layers and heap as they are. Raises
    ValueError, before anything is changed, for an attention implementation the model or the machine does not have.
    """
    with ExitStack() as scopes:
        if engine.attention != "auto":
            scopes.enter_context(_attention(model, engine.attention))
        # before the layers are compiled, which then see it
        if engine.narrow is True:
            scopes.enter_context(narrowed(model))
        if engine.compile is True:
            scopes.enter_context(_compiled(decoder_layers(model)))
        if engine.large_pages is True and next(model.parameters()).device.type == "cpu":
            scopes.enter_context(held_in_large_pages(model))
        yield


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    register()
    # a model shares one config among its modules, a multimodal one has several
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"attention {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
        yield
    finally:
        for config, value in before:
            config._attn_implementation = value


@contextmanager
def _compiled(layers: list[nn.Module]) -> Iterator[None]:
    """Each layer's call compiled in place. The layers stay the same objects, with the forward and class they had."""
    key = "_compiled_call_impl"
    before = [vars(layer).get(key, vars(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.compile(backend=BACKEND, dynamic=True)
        # past the limit dynamo would run the layers uncompiled without a word; and without guards on hooks it would run
        # a model that has some on the graph of one that has none
        options = {"recompile_limit": _GRAPHS, "skip_nnmodule_hook_guards": False}
        with (
            torch._dynamo.config.patch(**options),
            torch._inductor.config.patch(post_grad_custom_post_pass=BlockedProducts()),
        ):
            yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is vars(layer):
                vars(layer).pop(key, None)
            else:
                vars(layer)[key] = value
