"""The per-head loop against the hook: two ways to write the same edit."""

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, vectors_of
from benchmarks.peers.original import OriginalLofit
from tests.oracle import randomize
from tests.tiny_models import HEADS, tiny_model, tokens

CONFIGS = {
    "step 1": {"scale": "all"},
    "step 2": {"offset": [(0, 1), (2, 0), (2, 3)]},
    "both": {"scale": [(1, 0), (1, 2)], "offset": "all"},
}


def losses_and_gradients(kind, model, vectors):
    edit = kind(model, vectors)
    ids = tokens()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    edit.remove()
    return loss.detach(), {key: rows.grad for key, rows in edit.parameters.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_original_equals_the_hook(config):
    model = tiny_model("llama", torch.float64)
    handle = lf.patch(model, lf.LofitConfig(**config))
    randomize(handle)
    vectors = vectors_of(handle)
    handle.unpatch()
    base = model(tokens()).logits
    loss, gradients = losses_and_gradients(OriginalLofit, model, vectors)
    expected_loss, expected = losses_and_gradients(HookLofit, model, vectors)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        # the parameters are float32 in both, so their gradients are rounded to it
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)
    assert torch.equal(model(tokens()).logits, base)


def test_original_walks_over_every_head(llama, monkeypatch):
    clones = []
    clone = torch.Tensor.clone
    edit = OriginalLofit(llama, {(1, "offset"): ([2], torch.ones(1, 16))})
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kw: clones.append(self.shape) or clone(self, **kw))
    llama(tokens(), use_cache=False)
    edit.remove()
    assert len([shape for shape in clones if shape[-1] == 16]) == HEADS
