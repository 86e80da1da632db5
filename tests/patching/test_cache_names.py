"""A cache is found by whatever name a release of transformers gives it."""

import pytest

from lofit_fast.patching.cache_names import CACHES, given_cache


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_found_by_each_of_its_names(name):
    cache = object()
    assert given_cache({**dict.fromkeys(CACHES), name: cache, "input_ids": 1}) is cache
    assert given_cache(dict.fromkeys(CACHES)) is None
    assert given_cache({}) is None
