"""What tells the data and the weights of runs apart."""

import hashlib

import pytest
import torch

from lofit_fast.training.run_digests import data_digest, groups_digest, weights_digest
from tests.packed_linears import KINDS, packed_model
from tests.patched_models import logits
from tests.tiny_models import tiny_model


def projections(model):
    return [layer.self_attn.o_proj for layer in model.model.layers]


def test_data_digest():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    assert data_digest(rows) == data_digest([dict(reversed(r.items())) for r in rows])
    other_labels = [rows[0], {"input_ids": [3], "labels": [-100]}]
    assert len({data_digest(r) for r in (rows, rows[::-1], rows[:1], other_labels)}) == 4


def test_sequences_in_other_groups_are_other_data():
    a, b, c, d = ({"input_ids": [n], "labels": [n]} for n in range(4))
    groups = ([[a, b, c, d]], [[a, b], [c, d]], [[a], [b, c, d]], [[c, d], [a, b]])
    assert len({groups_digest(each) for each in groups}) == len(groups)
    assert len({data_digest(row for group in each for row in group) for each in groups[:3]}) == 1


def test_digest_of_dense_weights_is_what_it_was():
    model = tiny_model("llama")
    digest = hashlib.sha256()
    for projection in projections(model):
        digest.update(projection.weight[:1].detach().double().numpy().tobytes())
    assert weights_digest(projections(model)) == digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_digest_of_packed_weights(kind):
    model = packed_model(KINDS[kind])
    digest = weights_digest(projections(model))
    with torch.no_grad():
        logits(model)
    assert weights_digest(projections(model)) == digest
    assert weights_digest(projections(packed_model(KINDS[kind]))) == digest
    assert weights_digest(projections(packed_model(KINDS[kind], seed=1))) != digest
