"""The prefix cache in families whose layers are not all alike: the losses are those without, or nothing is cached."""

import warnings

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.patching.architectures import find_projections
from lofit_fast.training.prefix_cache.cache import PrefixCollator, prefix_cached
from tests.ordinary_sample import crossed
from tests.training.engine.engine_families import examples, family_model

# layers that read what lower ones have left beside the hidden states: nothing is cached then
TANGLED = ("gemma3n", "gemma4")


FAMILIES = ["qwen3_5", "gpt_oss", "jamba", "llava", "cohere2", "gemma2", *TANGLED]


# in the ordinary run each family padded or packed; slow: both
@pytest.mark.parametrize("family, packed", crossed(FAMILIES, [False, True]))
def test_a_prefix_is_exact_or_not_cached(family, packed, tmp_path):
    model = family_model(family)
    projections = find_projections(model)
    top = projections[-1].layer
    handle = lf.patch(model, lf.LofitConfig(scale=[(top, 0)], offset=[(top, 1)], init_std=0.1))
    collate = CompletionCollator(0, packed=packed)

    def results(batch):
        loss = model(**{**batch, "use_cache": False}).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(handle.parameters()))]

    expected = results(collate(examples()))
    with (
        warnings.catch_warnings(record=True) as said,
        prefix_cached(handle, examples(), collate, gb=0.1, folder=tmp_path) as collator,
    ):
        warnings.simplefilter("always")
        got = results(collator(examples()))
        cached = isinstance(collator, PrefixCollator)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
    assert cached or any("prefix cache off" in str(one.message) for one in said)
