"""Adapters of one base by name, of which one at a time is in the model: any heads, scales or offsets, any positions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lofit_fast.config import shown
from lofit_fast.patching.adapter_sources import adapter_for
from lofit_fast.patching.handle import LofitHandle, evaluating, patch

_NAME = re.compile(r"\w[\w.:-]{0,99}")


class AdapterSwitch:
    """A base model and its adapters, all read and checked when it is made.

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
        self._in: tuple[str, LofitHandle] | None = None
        # an adapter that the model cannot take is refused before anybody asks for it
        for name in adapters:
            with self.active(name):
                pass

    @property
    def names(self) -> tuple[str, ...]:
        """The base's name, then the adapters'."""
        return (self.base, *self._adapters)

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """A scope in which the model generates with an adapter, or, under the base's name, without one."""
        if self._in is not None and self._in[0] != name:
            self.close()
        if name != self.base and self._in is None:
            adapter = self._adapters[name]
            handle = patch(self.model, adapter.config)
            self._in = name, handle
            handle.take(adapter)
        with evaluating(self.model):
            yield

    def close(self) -> None:
        """Take the adapter that is in the model out of it."""
        if self._in is not None:
            self._in[1].unpatch()
            self._in = None


def check_name(name: str) -> None:
    """Raise ValueError for what is no name of a model in a request."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected the name of a model of letters, digits and . - : _, got {shown(name)}")
