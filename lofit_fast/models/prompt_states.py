"""A prompt's keys and values as one row of numbers per token, and a forward pass that goes on from them.

Vectors that act from the last prompt token on leave everything before it as the base made it. So the base computes the
keys and values of those tokens once, and then only the last prompt token and the answer go through the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lofit_fast.data.padding import rectangle
from lofit_fast.patching.cache_names import cache_name

# the prompts' keys and values, in a batch
PROMPTS = "prompt_states"


class NotPlain(Exception):
    """A model's prompts cannot be kept as keys and values; the message says why."""


@dataclass(frozen=True)
class Slots:
    """Where the layers' keys and values lie among a token's W numbers.

    shapes: (heads, width) of the keys of each layer of the cache, then of its values, layers ascending.
    """

    shapes: tuple[tuple[int, int], ...]

    @property
    def widths(self) -> list[int]:
        """Numbers of each of the shapes."""
        return [heads * width for heads, width in self.shapes]

    def cache(self, states: Tensor, *, grows: bool = False) -> DynamicCache:
        """states: (B, P, W). A cache of P tokens, which every forward pass finds and none changes: no copy is made.

        grows: whether passes add to it, as transformers' own do.
        """
        parts = states.split(self.widths, -1)
        pairs = zip(parts, self.shapes, strict=True)
        views = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in pairs]
        cache, kind = DynamicCache(), _Given if grows else _Kept
        cache.layers = [kind(*views[i : i + 2]) for i in range(0, len(views), 2)]
        return cache

    def laid(self, prompts: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
        """Prompts (P_i, W) padded on the left: (B, P, W). pinned: in memory that a device copies from by itself."""
        width = max(map(len, prompts))
        laid = prompts[0].new_empty((len(prompts), width, sum(self.widths)), pin_memory=pinned)
        for place, states in zip(laid, prompts, strict=True):
            place[width - len(states) :] = states
            # the mask hides them, but they must be numbers: 0 times NaN is NaN
            place[: width - len(states)] = 0
        return laid


class _Given(DynamicLayer):
    """A layer of transformers' cache that begins with keys and values (B, G, P, D)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class _Kept(_Given):
    """Keys and values in front of those of every forward pass, and never added to.

    What comes after is a function of the vectors, and lives no longer than the pass.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the layer attends to: (B, G, P + A, D) each."""
        before = self.keys.to(key_states.device), self.values.to(value_states.device)
        return torch.cat((before[0], key_states), -2), torch.cat((before[1], value_states), -2)

    def get_seq_length(self) -> int:
        """P."""
        return self.keys.shape[-2]


def prompt_states(
    decoder: nn.Module,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    beginning: tuple[Tensor, Slots] | None = None,
) -> tuple[Tensor, Slots]:
    """The keys and values of rows of tokens, (B, S, W), those of shorter rows at their beginning.

    decoder: the module that turns tokens into hidden states; it runs as it is. beginning: what this function returned
    for the tokens that all rows begin with, (1, n, W), which are not run again; every row must have more tokens than
    those. Raises NotPlain for a model that keeps anything but keys and values of every token.
    """
    known = 0 if beginning is None else beginning[0].shape[1]
    # no token sees what stands on its right, so that padding there needs no mask
    ids = rectangle([row[known:] for row in rows], 0).to(device)
    cache = DynamicCache()
    if beginning is not None:
        states, slots = beginning
        cache = slots.cache(states.expand(len(rows), -1, -1), grows=True)
    decoder(input_ids=ids, use_cache=True, **{cache_name(decoder): cache})
    shape = (len(rows), known + ids.shape[1])
    tensors = [tensor for layer in cache.layers for tensor in _plain(layer, shape)]
    if not tensors:
        raise NotPlain(f"{type(decoder).__name__} keeps no keys and values")
    slots = Slots(tuple((tensor.shape[1], tensor.shape[3]) for tensor in tensors))
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise NotPlain("its layers keep keys and values of several dtypes")
    return torch.cat([tensor.to(device).transpose(1, 2).flatten(2) for tensor in tensors], -1), slots


@contextmanager
def going_on(model: nn.Module, slots: Slots, acting: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A scope in which a batch with PROMPTS, (B, P, W), goes on from these prompts; the model itself never sees them.

    model: what is called with the batches. Such a batch brings position_ids (B, A) of its A tokens a row, and an
    attention_mask (B, P + A). acting: the scope that such a forward runs in. A batch without
    PROMPTS runs as it always does.
    """
    going = _Going()

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if PROMPTS not in kwargs:
            return None
        scope = ExitStack()
        scope.enter_context(acting())
        going.scopes.append(scope)
        given = {name: value for name, value in kwargs.items() if name != PROMPTS}
        return args, {**given, cache_name(module): slots.cache(kwargs[PROMPTS]), "use_cache": False}

    def drop(module: nn.Module, args: tuple, output: object) -> None:
        while going.scopes:
            going.scopes.pop().close()

    hooks = [
        # before other hooks read the batch
        model.register_forward_pre_hook(take, with_kwargs=True, prepend=True),
        model.register_forward_hook(drop, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        # what a keyboard's interrupt has ended runs no hooks
        drop(model, (), None)


class _Going(threading.local):
    """The scopes of the forwards that go on in a thread, the innermost last."""

    def __init__(self) -> None:
        self.scopes: list[ExitStack] = []


def _plain(layer: object, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A cache layer's keys and values. Raises NotPlain for any other state."""
    if type(layer) not in (DynamicLayer, _Given):
        raise NotPlain(f"it has a cache of another kind, a {type(layer).__name__}")
    for tensor in (layer.keys, layer.values):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
            raise NotPlain(f"it has a cache of another shape, {got} for {shape} tokens")
    return layer.keys, layer.values
