"""Adapters of one base by name, of which one answers at a time: any heads, scales or offsets, any positions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lofit_fast.config import shown
from lofit_fast.patching.adapter_sources import adapter_for
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patch import patch
from lofit_fast.patching.patched import evaluating

_NAME = re.compile(r"\w[\w.:-]{0,99}")


class AdapterSwitch:
    """A base model and its adapters, all read and checked when it is made.

    Adapters of offsets alone are in the model together, and `handle.set_active` goes from one to another. One with
    scales is in it by itself: to go there and back the model is patched anew.

    model: not patched. base: the base's name. It and the model are one thread's: the one that generates.
    Raises ValueError for a name that is no word, or the base's, and what loading an adapter raises.
    """

    def __init__(
        self, model: nn.Module, base: str, adapters: Mapping[str, Path | str], *, strict: bool = False
    ) -> None:
        for name in (base, *adapters):
            check_name(name)
        if base in adapters:
            raise ValueError(f"an adapter is called {base!r} as the base is: expected another name")
        self.model, self.base = model.requires_grad_(False), base
        self._adapters = {name: adapter_for(model, folder, None, strict) for name, folder in adapters.items()}
        self._handle: LofitHandle | None = None
        # an adapter that the model cannot take is refused before anybody asks for it
        for name in adapters:
            with self.active(name):
                pass
        # which thread is to generate is not known yet
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The base's name, then the adapters'."""
        return (self.base, *self._adapters)

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """A scope in which the model generates with an adapter, or, under the base's name, without one."""
        inside = () if self._handle is None else self._handle.adapters
        if name != self.base and name not in inside:
            self.close()
            self._handle = self._patched(self._together(name))
        if self._handle is not None:
            self._handle.set_active(None if name == self.base else name)
        with evaluating(self.model):
            yield

    def close(self) -> None:
        """Take what is in the model out of it."""
        if self._handle is not None:
            self._handle.unpatch()
            self._handle = None

    def _together(self, name: str) -> list[str]:
        """The adapters that are in the model when this one is."""
        config = self._adapters[name].config
        if config.scale is not None:
            return [name]
        alike = {other: adapter.config for other, adapter in self._adapters.items() if adapter.config.scale is None}
        return [other for other, its in alike.items() if its.positions == config.positions]

    def _patched(self, names: list[str]) -> LofitHandle:
        first, *others = names
        handle = patch(self.model, self._adapters[first].config, name=first)
        try:
            handle.take(self._adapters[first])
            for name in others:
                handle.add(name, self._adapters[name])
        except BaseException:
            handle.unpatch()
            raise
        return handle


def check_name(name: str) -> None:
    """Raise ValueError for what is no name of a model in a request."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected the name of a model of letters, digits and . - : _, got {shown(name)}")
