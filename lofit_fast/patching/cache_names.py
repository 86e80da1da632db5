"""What the forwards of models call the keys, values and states of tokens that they have seen; whether there are any."""

import inspect
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

# transformers 5.24 calls all of them "cache", and takes the older names until 5.40
CACHES = ("past_key_values", "cache_params", "cache")


def given_cache(kwargs: Mapping[str, object]) -> object | None:
    """The cache among the keywords of a call, or None."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def cache_name(model: nn.Module) -> str:
    """The name by which a model's forward takes a cache; the older one where it names none."""
    # a forward that somebody has put around the class's own passes on what it does not name
    named = [name for forward in (model.forward, type(model).forward) for name in inspect.signature(forward).parameters]
    return next((name for name in named if name in CACHES), CACHES[0])


def is_empty(cache: object) -> bool:
    """Whether a cache says that it has seen no token, and holds nothing of one in any of its layers.

    Its own length is that of one layer alone, which may be one that keeps no keys.
    """
    if not hasattr(cache, "get_seq_length"):
        return False
    layers = list(getattr(cache, "layers", ()))
    if any(int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")):
        return False
    # one whose layers all keep states cannot tell a length
    tells = not layers or any(hasattr(layer, "get_seq_length") for layer in layers)
    if tells and int(cache.get_seq_length()):
        return False
    return not any(_states(cache, layers))


def _states(cache: object, layers: list) -> Iterator[bool]:
    """Whether there is something in each state that layers without keys have: convolutions, recurrences."""
    # MiniMax keeps those of linear attention beside its layers, [] where there is none
    yield from (isinstance(state, Tensor) for state in getattr(cache, "linear_cache", ()))
    for layer in layers:
        # by number of the state where a layer has several
        yield from (seen is True for seen in _each(getattr(layer, "has_previous_state", False)))
        # a cache that was reset keeps its tensors, of zeros
        recurrent = _each(getattr(layer, "recurrent_states", None))
        yield from (bool(state.any()) for state in recurrent if isinstance(state, Tensor))


def _each(value: object) -> list:
    return list(value.values()) if isinstance(value, Mapping) else [value]
