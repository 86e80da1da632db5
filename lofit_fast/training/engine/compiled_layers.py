"""Decoder layers compiled in place, and put back: the one file that uses names which torch keeps to itself.

`nn.Module.compile` is public and has no inverse: what it sets is `_compiled_call_impl`, and taking that away is how a
layer becomes what it was. The limit on graphs per code object has no public name either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

BACKEND = "inductor"
_COMPILED = "_compiled_call_impl"
# graphs of one code object, which all layers share, of whatever model: with and without input gradient, narrowed, per
# adapter and mode
_GRAPHS = 64


@contextmanager
def compiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """A scope in which each layer's call is compiled, one graph for all batch lengths.

    The layers stay the same objects, with the forward and the class they had; afterwards they are as they were.
    """
    _make_room(layers)
    before = [vars(layer).get(_COMPILED, vars(layer)) for layer in layers]
    # past the limit dynamo would run the layers uncompiled without a word; and without guards on hooks it would run
    # a model that has some on the graph of one that has none
    options = {"recompile_limit": _GRAPHS, "skip_nnmodule_hook_guards": False}
    try:
        for layer in layers:
            layer.compile(backend=BACKEND, dynamic=True)
        with torch._dynamo.config.patch(**options):
            yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is vars(layer):
                vars(layer).pop(_COMPILED, None)
            else:
                vars(layer)[_COMPILED] = value


def _make_room(layers: Iterable[nn.Module]) -> None:
    """Drop the graphs of earlier scopes where they leave less than half of the room: a sweep's runs each bring some."""
    from torch._dynamo import eval_frame

    codes = {getattr(getattr(layer.forward, "__func__", layer.forward), "__code__", None) for layer in layers}
    for code in codes - {None}:
        if len(eval_frame._debug_get_cache_entry_list(code)) > _GRAPHS // 2:
            eval_frame.remove_from_cache(code)


def uncompiled(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """A scope in which these layers run eagerly: a graph of their own for a few passes would not pay."""
    return torch.compiler.set_stance("force_eager") if any_compiled(layers) else nullcontext()


def any_compiled(layers: Iterable[nn.Module]) -> bool:
    """Whether the call of any of the layers is compiled."""
    return any(vars(layer).get(_COMPILED) is not None for layer in layers)
