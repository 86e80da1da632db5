"""Batches whose logits are computed only where there is a label: the same loss, the same gradients, fewer rows."""

import pytest
import torch

from lofit_fast.cpu.attention import GROUPED, register
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.training import CompletionCollator
from tests.library_versions import BY_ROW, called
from tests.ordinary_sample import crossed
from tests.tiny_models import FAMILIES, tiny_model, tokens
from tests.training.engine.engine_families import family_model

register()
COLLATE = CompletionCollator(0, pad_to_multiple_of=1, logits="rows")
# what the installed transformers takes
STOCK = CompletionCollator(0, pad_to_multiple_of=1)
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


# in the ordinary run a family with the one or the other; slow: with both
@pytest.mark.parametrize("family, items", crossed(FAMILIES, [None, 5]))
def test_collate_changes_neither_loss_nor_gradients(family, items):
    model, batch = tiny_model(family), STOCK(rows())
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    full = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    losses = [model(**inputs, **more, use_cache=False).loss for inputs in (batch, full)]
    assert_same(model, *losses, 1e-6)


def test_collate_changes_nothing_in_float64(family):
    # from the logits: transformers computes every model's own loss in float32
    model, batch = tiny_model(family, torch.float64), STOCK(rows())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    kept = model(**inputs, logits_to_keep=batch["logits_to_keep"], use_cache=False).logits.flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(kept, batch["shift_labels"].flatten(), ignore_index=IGNORED)
    full = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(full, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    assert loss.dtype == torch.float64
    assert_same(model, loss, expected, 1e-12)


def test_collate_computes_labelled_rows_only(family):
    model, seen = tiny_model(family), []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape[:-1].numel()))
    called(model, CompletionCollator(0, logits=BY_ROW)(rows()))
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


@pytest.mark.parametrize(("length", "width"), [(7, 8), (8, 8), (9, 16)])
def test_widths_are_multiples_of_8(length, width, llama):
    ids = tokens(1, length)[0].tolist()
    rows = [{"input_ids": ids, "labels": ids}, {"input_ids": ids[:5], "labels": ids[:5]}]
    wide, narrow = CompletionCollator(0, logits="rows")(rows), COLLATE(rows)
    shapes = {tuple(wide[key].shape) for key in ("input_ids", "attention_mask", "labels", "logits_to_keep")}
    assert shapes == {(2, width)}
    assert wide["shift_labels"].equal(narrow["shift_labels"])
    with torch.no_grad():
        losses = [llama(**collate(rows), use_cache=False).loss.item() for collate in (CompletionCollator(0), STOCK)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_collate_refuses_a_batch_without_labels():
    with pytest.raises(ValueError, match="no labels"):
        COLLATE([{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}])


@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_examples_see_nothing_of_each_other(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)

    def packed(rows):
        batch = CompletionCollator(0, packed=True)(rows)
        assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
        states = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        return model(**batch).loss, states

    ids = [tokens(1, length, length)[0].tolist() for length in (12, 9, 11)]
    rows = [{"input_ids": row, "labels": [IGNORED] * 4 + row[4:]} for row in ids]
    changed = [rows[0], {"input_ids": tokens(1, 9, 99)[0].tolist(), "labels": rows[1]["labels"]}, rows[2]]
    with torch.no_grad():
        loss, states = packed(rows)
        other, perturbed = packed(changed)
        padded = model(**CompletionCollator(0)(rows), use_cache=False).loss
    assert loss.item() == pytest.approx(padded.item(), rel=1e-6)
    assert loss != other
    outside = [*range(12), *range(21, 32)]
    assert states[:, outside].equal(perturbed[:, outside])
    assert not states[:, 12:21].equal(perturbed[:, 12:21])


def test_packed_first_tokens_are_never_predicted():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = CompletionCollator(0, packed=True, logits="rows")(rows)
    assert batch["shift_labels"].tolist() == [6, 7, 9]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


# with a cache transformers takes a packed row for one example
CALLERS = {
    "bare loop": lambda model, batch, folder: model(**batch).loss,
    "stock Trainer": lambda model, batch, folder: stock_loss(model, batch, folder),
}


def stock_loss(model, batch, folder):
    """What a Trainer that knows nothing of us computes, its data loader included."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", prediction_loss_only=True)
    data = [{"row": 0}]
    trainer = Trainer(model, arguments, data_collator=lambda rows: dict(batch), eval_dataset=data)
    arguments.remove_unused_columns = False
    return torch.tensor(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    "name, caller", crossed(["llama", "gemma3", "gemma2", "llava", "gemma3_wrapper"], list(CALLERS))
)
def test_packed_batches_keep_their_boundaries_whoever_calls(name, caller, tmp_path):
    model = family_model(name)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True
    ids = [tokens(1, length, length)[0].tolist() for length in (12, 9, 11)]
    rows = [{"input_ids": row, "labels": [IGNORED] * 4 + row[4:]} for row in ids]
    with torch.no_grad():
        padded = model(**CompletionCollator(0)(rows), use_cache=False).loss
        packed = CALLERS[caller](model, CompletionCollator(0, packed=True)(rows), tmp_path)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)


def test_packed_rows_of_grouped_attention_take_a_cache(family):
    model = tiny_model(family)
    model.set_attn_implementation(GROUPED)
    ids = [tokens(1, length, length)[0].tolist() for length in (12, 9, 11)]
    rows = [{"input_ids": row, "labels": [IGNORED] * 4 + row[4:]} for row in ids]
    with torch.no_grad():
        losses = [model(**PackedCollator(0)(rows), use_cache=use).loss.item() for use in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
