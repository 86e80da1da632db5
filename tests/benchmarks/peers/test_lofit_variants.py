"""Variants of LoFiT on every head: each is its equation, and what it starts from."""

import pytest
import torch

from benchmarks.peers import lofit_variants
from tests.benchmarks.peers.edited import logits, shake
from tests.oracle import Hook
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model, tokens

VARIANTS = [{}, {"scales": True}, {"in_units": True}]


@pytest.mark.parametrize("how", VARIANTS)
def test_a_variant_is_its_equation(how):
    model, plain = (tiny_model("llama", torch.float64) for _ in range(2))
    base = logits(plain)
    attachment = lofit_variants.make(model, **how)
    if "in_units" in how:
        # the first batch that is trained on
        model.train()(tokens(2, 9))
        model.eval()
    assert (logits(model) - base).abs().max() <= 1e-12
    shake(attachment, 0.5)
    vectors = {}
    for number, layer in enumerate(model.model.layers):
        edit = layer.self_attn.o_proj.peer
        unit = edit.spread if "in_units" in how else 1.0
        vectors[number, "offset"] = (list(range(HEADS)), unit * edit.offset)
        if "scales" in how:
            vectors[number, "scale"] = (list(range(HEADS)), edit.scale)
    Hook(plain, vectors, torch.float64)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12 < 1e-3 < (logits(model) - base).abs().max()


@pytest.mark.parametrize("how", VARIANTS)
def test_a_variant_counts_its_vectors(llama, how):
    assert lofit_variants.make(llama, **how).n_parameters() == LAYERS * HEADS * HEAD_DIM * (1 + ("scales" in how))


def test_the_spread_is_that_of_a_head_over_tokens_and_stays():
    z = torch.randn(3, 5, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[..., :HEAD_DIM] = 7.0
    z[..., HEAD_DIM : 2 * HEAD_DIM] *= 10
    found = lofit_variants.spread_of(z, (HEADS, HEAD_DIM))
    heads = z.view(15, HEADS, HEAD_DIM)
    expected = torch.stack([heads[:, h].var(0, correction=0).mean().sqrt() for h in range(HEADS)])
    assert found.shape == (HEADS, 1) and found[0] == lofit_variants._LEAST
    torch.testing.assert_close(found[1:, 0], expected[1:])
    edit = lofit_variants.WholeHeads(HEADS, HEAD_DIM, scales=False, in_units=True)
    edit.eval()(z.float())
    assert edit.spread is None
    edit.train()(z.float())
    kept = edit.spread
    edit(2 * z.float())
    assert edit.spread is kept
