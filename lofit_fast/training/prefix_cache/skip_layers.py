"""Stand-ins for decoder layers: they hold a layer's place while its work is not needed, and leave without a trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class States(threading.local):
    """Where stand-ins put hidden states, and take them from, in the forward that a thread is in.

    value: (B, S, N), or None when there are none. stops: whether forwards of this thread end at the stand-ins.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.stops = False


class StandIn(nn.Module):
    """In a layer's place in the list: hands the hidden states on as they came, where its thread's forwards end there.

    The layer does its work for all others.
    Every other attribute is the layer's own, so that a model which asks its layers for their type gets the answer. The
    layer itself is no submodule: whatever walks the model (modes, checkpointing, optimizers) does not meet it.
    """

    def __init__(self, layer: nn.Module, states: States) -> None:
        super().__init__()
        # past nn.Module's own bookkeeping
        self.__dict__["layer"] = layer
        self.states = states

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states: (B, S, N). Returns them, or what the layer makes of them."""
        return hidden_states if self.states.stops else self.layer(hidden_states, *args, **kwargs)


class Recording(StandIn):
    """Keeps the hidden states that would have entered its layer."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states: (B, S, N). Returns them, or what the layer makes of them."""
        if self.states.stops:
            self.states.value = hidden_states
        return super().forward(hidden_states, *args, **kwargs)


class Skipping(StandIn):
    """Skips its layer when there are states to go on from, and runs it when there are none, without a graph."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states: (B, S, N). Returns them, or what the layer makes of them."""
        if self.states.value is not None:
            return hidden_states
        with torch.no_grad():
            return self.layer(hidden_states, *args, **kwargs)


class Emitting(Skipping):
    """The first of those that skip: gives out the states in place of what came in.

    Raises ValueError for states of another shape than the batch.
    """

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states: (B, S, N). Returns the states, or what the layer makes of its input."""
        states = self.states.value
        if states is None:
            return super().forward(hidden_states, *args, **kwargs)
        if states.shape != hidden_states.shape:
            raise ValueError(f"expected states of shape {tuple(hidden_states.shape)}, got {tuple(states.shape)}")
        return states


@contextmanager
def standing_in(layers: nn.ModuleList, stand_ins: Mapping[int, StandIn]) -> Iterator[None]:
    """A scope in which stand-ins hold the places of layers, by index. Afterwards the very same layers are back."""
    before = {index: layers[index] for index in stand_ins}
    try:
        for index, stand_in in stand_ins.items():
            layers[index] = stand_in
        yield
    finally:
        for index, layer in before.items():
            layers[index] = layer


@contextmanager
def recorded(layers: nn.ModuleList, at: int) -> Iterator[States]:
    """A scope in which the model stops working at layer `at`, and leaves the states that enter it in the result.

    For the thread that has entered it alone: the forwards of others are whole.
    """
    states = States()
    states.stops = True
    stand_ins = {i: (Recording if i == at else StandIn)(layers[i], states) for i in range(at, len(layers))}
    with standing_in(layers, stand_ins):
        yield states


@contextmanager
def skipped(model: nn.Module, layers: nn.ModuleList, until: int, key: str) -> Iterator[None]:
    """A scope in which the layers below `until` are skipped by every forward of the model that is given states.

    key: the keyword under which a batch brings them, (B, S, N); the model itself never sees it. A batch without runs
    those layers as ever, except that no graph is built there. States are those of the thread that brings them.
    """
    states = States()

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states.value = kwargs.get(key)
        return args, {name: value for name, value in kwargs.items() if name != key}

    def drop(module: nn.Module, args: tuple, output: object) -> None:
        states.value = None

    stand_ins = {i: (Skipping if i else Emitting)(layers[i], states) for i in range(until)}
    hooks = [
        model.register_forward_pre_hook(take, with_kwargs=True),
        model.register_forward_hook(drop, always_call=True),
    ]
    try:
        with standing_in(layers, stand_ins):
            yield
    finally:
        for hook in hooks:
            hook.remove()
