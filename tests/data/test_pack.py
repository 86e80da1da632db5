"""Packed batches with their beginning once: the same losses and gradients, from fewer tokens."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

import lofit_fast as lf
from lofit_fast.cpu.attention import GROUPED, register
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.training import CompletionCollator, Engine, LofitTrainer, prepared
from lofit_fast.training.engine import collator_of
from lofit_fast.training.trainer import Rows
from tests.library_versions import BY_ROW, called
from tests.ordinary_sample import crossed
from tests.tiny_models import FAMILIES, tiny_model, tokens

register()
EXACT = PackedCollator(0, tokens_multiple_of=1, width_multiple_of=1, logits=BY_ROW)
ROUNDED = PackedCollator(0, logits=BY_ROW)
CASES = [*((family, {}) for family in FAMILIES), ("gemma2", {"sliding_window": 4})]
# (tokens, labelled tokens) after the shared beginning
SHAPES = ((11, 3), (4, 1), (9, 4))


def examples(shared=5, shapes=SHAPES):
    beginning = tokens(1, shared, 99)[0].tolist() if shared else []
    rows = []
    for seed, (length, labelled) in enumerate(shapes):
        # the first of its own tells it from the others
        ids = [*beginning, 3 + seed, *tokens(1, length, seed)[0].tolist()]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - labelled) + ids[-labelled:]})
    return rows


def results(model, parameters, batch):
    """The logits where there is a label, and the loss's gradients; transformers' own loss is float32."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    logits = called(model, inputs).logits.flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(logits, batch["shift_labels"])
    return logits.detach(), *torch.autograd.grad(loss, parameters)


def patched(family, **changes):
    model = tiny_model(family, torch.float64, **changes)
    handle = lf.patch(model, lf.LofitConfig(scale="all", offset="all", init_std=0.1))
    for layer in handle.layers.values():
        layer.double()
    model.set_attn_implementation(GROUPED)
    return model, list(handle.parameters())


# in the ordinary run each family with a beginning of one length; slow: of every length
@pytest.mark.parametrize("family, changes, shared", crossed(CASES, [5, 1, 0]))
def test_packing_changes_neither_logits_nor_gradients(family, changes, shared):
    model, parameters = patched(family, **changes)
    logits, *gradients = results(model, parameters, CompletionCollator(0, logits=BY_ROW)(examples(shared)))
    for collate in (EXACT, ROUNDED):
        other, *others = results(model, parameters, collate(examples(shared)))
        assert other.dtype == torch.float64
        torch.testing.assert_close(other, logits, rtol=1e-10, atol=1e-12)
        # transformers' norms are float32 in any dtype, and round what reaches a shared token in another order
        for got, expected in zip(others, gradients, strict=True):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("shared", [0, 1, 5])
@pytest.mark.parametrize("collate", [EXACT, ROUNDED], ids=["exact", "rounded"])
def test_a_packed_row_holds_each_example_but_its_last_token(collate, shared):
    rows = examples(shared)
    batch = replace(collate, logits="rows")(rows)
    # a single token is not worth a shape of its own
    saved = shared if shared > 1 else 0
    real = sum(len(row["input_ids"]) - 1 for row in rows) - saved * (len(rows) - 1)
    filled = -(-real // collate.tokens_multiple_of) * collate.tokens_multiple_of
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, filled)
    assert len(batch["packed_places"]) == filled - saved
    assert batch["packed_rows"].shape == batch["attention_mask"].shape
    assert batch["packed_rows"].shape[1] % collate.width_multiple_of == 0
    for row, index, mask in zip(rows, batch["packed_rows"], batch["attention_mask"], strict=True):
        length = len(row["input_ids"]) - 1
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        there = index[:length]
        assert batch["input_ids"][0, there].tolist() == row["input_ids"][:-1]
        assert batch["labels"][0, there].tolist() == row["labels"][1:]
        assert batch["position_ids"][0, there].tolist() == list(range(length))
    places = batch["packed_rows"].flatten()[batch["packed_places"]]
    assert places.tolist() == list(range(saved, filled))
    assert batch["shift_labels"].tolist() == [label for row in rows for label in row["labels"] if label != IGNORED]
    assert batch["labels"][batch["logits_to_keep"]].equal(batch["shift_labels"])


def test_what_predicts_a_label_is_not_shared():
    ids = tokens(1, 8)[0].tolist()
    rows = [{"input_ids": [*ids, last], "labels": [IGNORED] * 6 + [*ids[6:], last]} for last in (5, 6)]
    batch = EXACT(rows)
    # token 5 predicts the first label
    assert batch["input_ids"].shape[1] - len(batch["packed_places"]) == 5
    assert batch["shift_labels"].tolist() == [*ids[6:], 5, *ids[6:], 6]


def test_equal_examples_keep_a_token_of_their_own():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED] * 4 + [9]}
    assert EXACT([row, row])["input_ids"].tolist() == [[5, 6, 7, 8, 8]]


def test_a_single_example_is_padded():
    row = examples()[0]
    packed, padded = PackedCollator(0)([row]), CompletionCollator(0)([row])
    assert packed.keys() == padded.keys()
    assert all(packed[key].equal(padded[key]) for key in padded)


def test_packing_refuses_a_batch_without_labels():
    with pytest.raises(ValueError, match="no labels"):
        EXACT([{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}] * 2)


def test_packed_examples_with_a_beginning_see_nothing_of_each_other(family):
    model, _ = patched(family)
    rows = examples()
    changed = [
        rows[0],
        {"input_ids": [*rows[1]["input_ids"][:5], *range(40, 45)], "labels": rows[1]["labels"]},
        rows[2],
    ]
    with torch.no_grad():
        before, after = (called(model, EXACT(given)).logits.flatten(0, -2) for given in (rows, changed))
    own = slice(3, 4)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert before[others].equal(after[others])
    assert not before[own].equal(after[own])


@pytest.mark.slow
def test_compiled_packed_batches_are_right_and_share_their_graphs(llama, dynamo):
    handle = lf.patch(llama, lf.LofitConfig(scale="all", init_std=0.1))
    # the first of another length than the model is wide, which a compiler would take for the same number
    shapes = (((17, 2), (9, 1), (8, 3), (5, 2)), SHAPES, ((30, 1), (22, 5)))
    batches = [PackedCollator(0)(examples(shared, shape)) for shared, shape in zip((5, 4, 7), shapes, strict=True)]
    graphs = torch._dynamo.utils.counters["stats"]

    def losses(engine):
        found, count = [], graphs["unique_graphs"]
        with prepared(llama, engine):
            for batch in batches:
                loss = llama(**batch, use_cache=False).loss
                found += [loss.detach(), *torch.autograd.grad(loss, list(handle.parameters()))]
        return found, graphs["unique_graphs"] - count

    plain, _ = losses(Engine(attention=GROUPED, compile=False))
    compiled, count = losses(Engine(attention=GROUPED, compile=True, narrow=True))
    for got, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # below the lowest scale no input gradient is wanted: the first layer has a graph of its own, the narrow one too
    assert count == 3


def test_evaluation_is_that_of_padded_batches(llama, tmp_path):
    handle = lf.patch(llama, lf.LofitConfig(scale="all"))
    llama.set_attn_implementation(GROUPED)
    data = examples() + examples(shapes=((6, 2), (7, 5)))
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to="none", prediction_loss_only=True
    )

    def loss(collate):
        trainer = LofitTrainer(handle, on_epoch=None, args=arguments, eval_dataset=Rows(data), data_collator=collate)
        return trainer.evaluate()["eval_loss"]

    assert loss(PackedCollator(0)) == pytest.approx(loss(CompletionCollator(0)), rel=1e-5)


@pytest.mark.parametrize(
    ("attention", "packing", "expected"),
    [
        (GROUPED, True, PackedCollator(7, logits="rows")),
        (GROUPED, False, CompletionCollator(7, logits="rows")),
        ("flash_attention_2", True, CompletionCollator(7, packed=True, logits="rows", boundaries=True)),
        ("sdpa", "auto", CompletionCollator(7, logits="rows")),
    ],
)
def test_an_engine_has_one_collator(attention, packing, expected):
    assert collator_of(Engine(attention=attention, packing=packing), 7) == expected
