"""Attention that multiplies by its projection's weight itself: a layer of ours around the projection is never called.

Its source says so in most cases, and is read before a model is patched. What that does not show is seen in the first
forward, and in the first one with another forward of the attention: the weight was read, and our layer was not called.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import nn

UNCALLED = (
    "a projection's weight is read in a graph, and the forward that its attention has now has not called LoFiT's layer "
    "around it yet: whether LoFiT's vectors act cannot be told. Please run one forward before torch.compile"
)
# what may be asked of a weight without computing with it
_HARMLESS = r"(?!\.(?:dtype|device|shape|size|ndim|requires_grad|is_meta)\b)"


def bypasses(parent: nn.Module, attribute: str, unless: str | None) -> bool:
    """Whether the code of an attention, its class's or its own, computes with its projection's weight itself.

    attribute: the projection's name in it. unless: the attention's attribute that decides, for code that does either.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return True
    kind, own = type(parent), vars(parent).get("forward")
    reads = _class_reads(kind.forward, kind, attribute) or (own is not None and _reads(own, kind, attribute))
    return reads and (unless is None or bool(getattr(parent, unless, False)))


def _reads(forward: Callable, kind: type, attribute: str) -> bool:
    """Whether a forward, or a method of the class that it calls, reads the weight."""
    return any(_reads_weight(source, attribute) for source in _sources(forward, kind))


# of classes, which have many instances
_class_reads = cache(_reads)


def _reads_weight(source: str, attribute: str) -> bool:
    # "o = self.o_proj", of which "o.weight" is read later
    aliases = re.findall(rf"\b(\w+)\s*=\s*\w+\.{attribute}\s*(?:[;#\n]|$)", source)
    places = [rf"\w+\.{attribute}", *map(re.escape, aliases)]
    return any(re.search(rf"\b{place}\.weight\b{_HARMLESS}", source) for place in places)


def _sources(forward: Callable, kind: type) -> Iterator[str]:
    """The source of a forward and of the methods that it leads to, those of parent classes among them."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    waiting, asked = [forward], set()
    while waiting:
        function = waiting.pop()
        if function in asked:
            continue
        asked.add(function)
        yield (source := _source(function))
        for name in set(re.findall(r"\.(\w+)\s*\(", source)):
            methods = [found for each in classes if inspect.isfunction(found := vars(each).get(name))]
            waiting += methods if re.search(rf"\bsuper\(.*?\)\.{name}\b", source) else methods[:1]


def _source(function: Callable) -> str:
    """A function's source; "" for what was built or typed in somewhere without a file."""
    while isinstance(function, partial):
        function = function.func
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


class Called:
    """Whether a layer was called since it was made: beside the module, whose own attributes stay what they are."""

    once = False


def weight_is_read(layer: nn.Module) -> None:
    """Tell what watches a layer of ours that its weight is read, unless its attention is known to call it.

    Raises ValueError where a compiler traces it: a graph is made once, and nobody would see what it leaves out. A
    compiler that may leave frames uncompiled leaves this one, which then tells.
    """
    if layer.called.once or not layer.bypass:
        return
    if torch.compiler.is_compiling():
        raise ValueError(UNCALLED)
    for watch in layer.bypass:
        watch.saw_read(layer)


class BypassWatch:
    """Raises an error at the end of a forward in which an attention has read its projection's weight and not called it.

    A layer that was called is asked no more, until its attention has another forward. One that its attention leaves out
    without reading the weight, or whose attention has not run (layers that are dropped, skipped or called singly), is
    no matter.

    decoder: whose forward is watched. A copy of the model watches itself, and one of a part of it nothing.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        # each layer of ours with the attention that holds it, and its name
        self.parents: tuple[tuple[nn.Module, nn.Module, str], ...] = ()
        # (thread, layer): rare, since code reads a weight to compute with it
        self._read: list[tuple[int, nn.Module]] = []
        # of the attentions, as they were in the last forward
        self._forwards: list[Callable | None] = []
        self._hooks = (
            decoder.register_forward_pre_hook(self._before_forward),
            decoder.register_forward_hook(self._after_forward),
        )

    def __getstate__(self) -> dict:
        # other programs may not have these forwards
        return {**vars(self), "_read": [], "_forwards": [None] * len(self.parents)}

    def __deepcopy__(self, memo: dict) -> BypassWatch:
        if id(self.decoder) not in memo:
            # the decoder would be copied with each of its parts
            return self
        copied = memo[id(self)] = BypassWatch.__new__(BypassWatch)
        vars(copied).update(copy.deepcopy({**vars(self), "_read": []}, memo))
        return copied

    def add(self, layer: nn.Module, parent: nn.Module, name: str) -> None:
        """Watch one layer of ours. parent: the attention that holds it. name: of the projection that was there.

        The layer says in `called` whether it was, and tells its `bypass` where its weight is read.
        """
        self.parents = (*self.parents, (layer, parent, name))
        self._forwards.append(_forward_of(parent))
        # in a tuple, lest it become a child
        layer.bypass = (self,)

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def saw_read(self, layer: nn.Module) -> None:
        """Take note that a layer's weight was read that its attention was never seen to call; told in eager code."""
        running = _running()
        if not running or layer in running:
            return
        parts = set(running[0].modules())
        # the attention, or the decoder's layer around it, and nothing that also holds layers which may be left out
        held = any(mine is layer and parent is running[0] for mine, parent, _ in self.parents)
        if held or (layer in parts and self.decoder not in parts):
            self._read.append((threading.get_ident(), layer))

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # a replica of data parallelism shares these hooks
        if module is not self.decoder:
            return
        for place, (layer, parent, _) in enumerate(self.parents):
            now, before = _forward_of(parent), self._forwards[place]
            if now != before:
                if before is not None:
                    _run_as_it_is()
                layer.called.once, self._forwards[place] = False, now

    def _after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        if not self._read:
            return
        _run_as_it_is()
        thread = threading.get_ident()
        missed = [layer for reader, layer in self._read if reader == thread and not layer.called.once]
        self._read = [entry for entry in self._read if entry[0] != thread]
        for layer, parent, name in self.parents:
            if layer in missed:
                raise ValueError(
                    f"{name}: {type(parent).__name__} has read its projection's weight and not called the projection, "
                    "so that LoFiT's vectors do not act: take LoFiT out of the model (unpatch, unload), and put it in "
                    "without what replaces the forward of its attention"
                )


def _forward_of(attention: nn.Module) -> Callable:
    return attention.__dict__.get("forward") or type(attention).forward


def _run_as_it_is() -> None:
    """Keep a compiler from the frame that calls this: none makes a graph of what raises an error."""
    if torch.compiler.is_compiling():
        raise RuntimeError("expected a frame that runs, got a compiler's: please run one forward before torch.compile")


def _running() -> list[nn.Module]:
    """The modules that are being called in this thread, the innermost first."""
    _run_as_it_is()
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and isinstance(module := frame.f_locals.get("self"), nn.Module):
            found.append(module)
        frame = frame.f_back
    return found
