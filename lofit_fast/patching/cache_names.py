"""What the forwards of models call the keys, values and states of tokens that they have seen."""

from collections.abc import Mapping

# transformers 5.24 calls all of them "cache", and takes the older names until 5.40
CACHES = ("past_key_values", "cache_params", "cache")


def given_cache(kwargs: Mapping[str, object]) -> object | None:
    """The cache among the keywords of a call, or None."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
