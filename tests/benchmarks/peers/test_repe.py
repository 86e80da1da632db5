"""RepE: reading vectors against plain formulas, and where they are added."""

import pytest
import torch

from benchmarks.peers import repe
from lofit_fast.data.encode import encode_prompt
from tests.benchmarks.peers.edited import CONTRASTS, logits
from tests.tiny_models import HIDDEN, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


def test_repe_vectors_are_first_principal_components():
    draw = torch.Generator().manual_seed(3)
    right, wrong = torch.randn(2, 9, 2, 5, generator=draw, dtype=torch.float64)
    right = right + 3 * torch.eye(5)[1]
    got = repe.reading_vectors(right, wrong)
    for layer in range(2):
        differences = right[:, layer] - wrong[:, layer]
        _, axes = torch.linalg.eigh(differences.T @ differences)
        unit = axes[:, -1] * (differences.mean(0) @ axes[:, -1]).sign()
        along = torch.cat((right[:, layer], wrong[:, layer])) @ unit
        assert (got[layer] - along.var(correction=0).sqrt() * unit).abs().max() <= 1e-6
        assert got[layer, 1] > 0


def test_repe_reads_every_layer_at_the_last_token(llama):
    tokenizer = tiny_tokenizer()
    for states, answer in zip(repe.last_states(llama, tokenizer, CONTRASTS), ("right", "wrong"), strict=True):
        for row, contrast in zip(states, CONTRASTS, strict=True):
            ids = encode_prompt(tokenizer, contrast.prompt)
            ids += tokenizer(getattr(contrast, answer), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                expected = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states
            # transformers gives the last layer's after the final norm
            assert (row[0] - expected[1][0, -1]).abs().max() <= 1e-5
            assert (llama.model.norm(row[2]) - expected[3][0, -1]).abs().max() <= 1e-5


@pytest.mark.parametrize(("span", "layers"), [((0.0, 1.0), [0, 1, 2]), ((0.34, 0.7), [1])])
def test_repe_is_its_equation(span, layers):
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    vectors = repe.reading_vectors(*repe.last_states(plain, tiny_tokenizer(), CONTRASTS))
    attachment = repe.make(model, tiny_tokenizer(), CONTRASTS, coefficient=1.5, span=span)
    assert attachment.n_parameters() == len(layers) * HIDDEN
    assert list(attachment.parameters()) == []
    base = logits(plain)
    for n in layers:
        plain.model.layers[n].register_forward_hook(lambda _, __, h, n=n: h + (1.5 * vectors[n]).double())
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12
    assert (logits(model) - base).abs().max() > 1e-2


def test_repe_refuses_spans_without_layers(llama):
    for span in ((0.5, 0.5), (0.7, 0.2), (0.0, 1.5)):
        with pytest.raises(ValueError, match="span"):
            repe.make(llama, tiny_tokenizer(), CONTRASTS, span=span)
    with pytest.raises(ValueError, match="contrast"):
        repe.make(llama, tiny_tokenizer(), [])
