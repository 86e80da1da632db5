"""What the forwards of models call the keys, values and states of tokens that they have seen."""

import inspect
from collections.abc import Mapping

from torch import nn

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
