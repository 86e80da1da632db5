"""Batches whose logits are computed only where there is a label: the same loss, the same gradients, fewer rows."""

import pytest
import torch

from lofit_fast.encoding import IGNORED
from lofit_fast.training import CompletionCollator
from tests.tiny import tiny_model, tokens

COLLATE = CompletionCollator(0)
# (tokens, labelled tokens) of each row
SHAPES = ((11, 3), (5, 1), (9, 4))


def rows():
    result = []
    for seed, (length, labelled) in enumerate(SHAPES):
        ids = tokens(1, length, seed)[0].tolist()
        result.append({"input_ids": ids, "labels": [IGNORED] * (length - labelled) + ids[-labelled:]})
    return result


def assert_same(model, loss, expected, tolerance):
    assert abs(loss - expected) <= tolerance * abs(expected)
    parameters = list(model.parameters())
    gradients, wanted = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    size = max(gradient.abs().max() for gradient in wanted)
    assert size > 0
    for got, gradient in zip(gradients, wanted, strict=True):
        assert (got - gradient).abs().max() <= tolerance * size


@pytest.mark.parametrize("items", [None, 5])
def test_collate_changes_neither_loss_nor_gradients(family, items):
    model, batch = tiny_model(family), COLLATE(rows())
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    full = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    losses = [model(**inputs, **more, use_cache=False).loss for inputs in (batch, full)]
    assert_same(model, *losses, 1e-6)


def test_collate_changes_nothing_in_float64(family):
    # from the logits: transformers computes every model's own loss in float32
    model, batch = tiny_model(family, torch.float64), COLLATE(rows())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    kept = model(**inputs, logits_to_keep=batch["logits_to_keep"], use_cache=False).logits.flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(kept, batch["shift_labels"])
    full = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(full, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    assert loss.dtype == torch.float64
    assert_same(model, loss, expected, 1e-12)


def test_collate_computes_labelled_rows_only(family):
    model, seen = tiny_model(family), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    model(**COLLATE(rows()), use_cache=False)
    assert seen == [sum(labelled for _, labelled in SHAPES)]


def test_collate_pads_on_the_right():
    batch, given = COLLATE(rows()), rows()
    for i, (length, _) in enumerate(SHAPES):
        assert batch["input_ids"][i].tolist() == given[i]["input_ids"] + [0] * (11 - length)
        assert batch["labels"][i].tolist() == given[i]["labels"] + [IGNORED] * (11 - length)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (11 - length)


def test_collate_keeps_the_position_before_each_label():
    batch = COLLATE(rows())
    assert batch["logits_to_keep"].dtype == torch.bool
    for i, (length, labelled) in enumerate(SHAPES):
        kept = batch["logits_to_keep"][i].nonzero().flatten().tolist()
        assert kept == list(range(length - labelled - 1, length - 1))
    expected = [label for row in rows() for label in row["labels"] if label != IGNORED]
    assert batch["shift_labels"].tolist() == expected


def test_collate_has_nothing_to_predict_the_first_token_with():
    ids = tokens(1, 4)[0].tolist()
    batch = COLLATE([{"input_ids": ids, "labels": ids}])
    assert batch["shift_labels"].tolist() == ids[1:]


def test_collate_refuses_a_batch_without_labels():
    with pytest.raises(ValueError, match="no labels"):
        COLLATE([{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}])
