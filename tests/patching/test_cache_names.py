"""A cache is found by whatever name a release of transformers gives it."""

import pytest
import torch

from lofit_fast.patching.cache_names import CACHES, cache_name, given_cache


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_found_by_each_of_its_names(name):
    cache = object()
    assert given_cache({**dict.fromkeys(CACHES), name: cache, "input_ids": 1}) is cache
    assert given_cache(dict.fromkeys(CACHES)) is None
    assert given_cache({}) is None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_forward_is_given_a_cache_by_its_own_name(name):
    class Decoder(torch.nn.Module):
        if name == "cache":

            def forward(self, input_ids, cache=None):
                return cache

        else:

            def forward(self, input_ids, past_key_values=None):
                return past_key_values

    model = Decoder()
    assert cache_name(model) == name
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs)
    assert cache_name(model) == name
    model.forward = lambda *args: forward(*args)
    assert cache_name(model) == name
