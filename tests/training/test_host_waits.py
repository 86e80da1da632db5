"""No step of a training makes the host wait for the device: shown on a device where waiting is impossible."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.collate import on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.engine import Engine, collator_of, prepared
from lofit_fast.training.engine.causal_attention import CAUSAL
from lofit_fast.training.engine.device_queue import Sender
from lofit_fast.training.prefix_cache.cache import STATES, PrefixCollator
from lofit_fast.training.prefix_cache.skip_layers import skipped
from lofit_fast.training.prefix_cache.store import PrefixStore, digest
from lofit_fast.training.trainer import LofitTrainer, Rows, undisturbed
from tests.library_versions import eager_masks_do_not_wait
from tests.tiny_models import HIDDEN, tiny_model, tokens
from tests.training.host_waits import META, EndOfEpoch, Made, OneEpoch, Waits, meta_as_an_accelerator, on_meta

STEPS = 2


def rows(count, longest=12):
    made = []
    for seed in range(count):
        ids, labelled = tokens(1, longest - seed % 5, seed)[0].tolist(), 2 + seed % 3
        made.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - labelled) + ids[-labelled:]})
    return made


def waits_of(handle, engine, folder, *, accumulation=1, l1=0.1, logits="index", collate=None, **more):
    """What the host waits for in an epoch's steps, by name. more: TrainingArguments' fields."""
    model = on_meta(handle.model)
    schedule = Schedule(1e-2, 2, batch_size=4, accumulation_steps=accumulation, l1=l1)
    waits, made = Waits(META), Made(META)
    epoch, data = OneEpoch(waits, made), rows(4 * STEPS)
    collator = collator_of(engine, 0, logits)
    with undisturbed(model), prepared(model, engine), selecting_rows(model):
        trainer = LofitTrainer(
            handle,
            l1=l1,
            on_epoch=lambda row: None,
            callbacks=[epoch],
            args=training_arguments(model, folder, schedule, progress=False, prediction_loss_only=True, **more),
            train_dataset=Rows(data),
            data_collator=collator if collate is None else collate(collator),
        )
        with waits, made, pytest.raises(EndOfEpoch):
            trainer.train()
    assert epoch.steps == STEPS
    assert trainer.optimizer.optimizer.defaults["fused"]
    return waits.seen + made.seen


CONFIGS = {
    "step 1": {"scale": "all"},
    "step 2": {"offset": [(1, 0), (2, 3)]},
    "both": {"scale": "all", "offset": "all"},
}


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    meta_as_an_accelerator(monkeypatch)


ENGINE = Engine(attention=CAUSAL, packing=False, narrow=True, compile=False)


def patched(config="both", family="llama"):
    return lf.patch(tiny_model(family), lf.LofitConfig(**CONFIGS[config]))


@pytest.mark.parametrize(("config", "accumulation"), [("step 1", 1), ("step 2", 1), ("both", 2)])
def test_no_step_waits(config, accumulation, tmp_path):
    assert not waits_of(patched(config), ENGINE, tmp_path, accumulation=accumulation)


# windows shorter than the rows and norms of heads; no narrowing
@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma3", CAUSAL), ("mistral", CAUSAL), pytest.param("gemma2", "eager", marks=eager_masks_do_not_wait)],
)
def test_no_step_of_a_family_waits(family, attention, tmp_path):
    engine = replace(ENGINE, attention=attention, narrow=family != "mistral")
    assert not waits_of(patched(family=family), engine, tmp_path)


def test_no_step_on_cached_states_waits(tmp_path):
    handle = patched("step 2")
    model, data = handle.model, rows(4 * STEPS)
    ids = [row["input_ids"] for row in data]
    ends = list(accumulate(map(len, ids)))
    places = {digest(row): (end - len(row), len(row)) for row, end in zip(ids, ends, strict=True)}
    store = PrefixStore(torch.ones(ends[-1], HIDDEN), places)
    with skipped(model, model.model.layers, 1, STATES):
        assert not waits_of(handle, ENGINE, tmp_path, collate=lambda plain: PrefixCollator(plain, store))


def test_cached_states_are_laid_where_a_device_can_copy_them(monkeypatch):
    asked, make = [], torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, size, pin_memory: asked.append(pin_memory) or make(self, size)
    )
    (row,) = rows(1)
    store = PrefixStore(torch.ones(len(row["input_ids"]), HIDDEN), {digest(row["input_ids"]): (0, 12)})
    for pinned in (False, True):
        PrefixCollator(lambda rows: {"input_ids": torch.tensor([row["input_ids"]])}, store, pinned=pinned)([row])
    assert asked == [False, True]


# each of these was in a step once, and is noticed here
WAITED = {
    "the filter for NaN": (ENGINE, {"logging_nan_inf_filter": True}, "item"),
    "whether there is padding": (replace(ENGINE, attention="sdpa"), {}, "item"),
    # transformers before 5.21 takes no mask at all
    "a mask as an index": (replace(ENGINE, narrow=False), {"logits": "rows"}, "nonzero|too many indices"),
    "a mask that is counted": (ENGINE, {"logits": "rows"}, "nonzero"),
}


@pytest.mark.parametrize("name", WAITED)
def test_what_waits_is_noticed(name, tmp_path):
    engine, options, says = WAITED[name]
    with pytest.raises((RuntimeError, NotImplementedError, IndexError), match=says):
        waits_of(patched(), engine, tmp_path, **options)


def test_copies_that_block_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Sender, "send", lambda self, batches: [on_device(batch, META) for batch in batches])
    # the tensors of a batch
    assert waits_of(patched(), ENGINE, tmp_path) == {"blocking _to_copy": 5 * STEPS}


def test_nothing_inside_our_operations_reads_a_value():
    # the meta device sees their outsides alone
    handle = patched()
    batch = collator_of(ENGINE, 0, "index")(rows(4))
    with prepared(handle.model, ENGINE), selecting_rows(handle.model), Waits("cpu") as waits:
        handle.model(**batch, use_cache=False).loss.backward()
    assert not waits.seen
    assert all(parameter.grad.abs().sum() > 0 for parameter in handle.parameters())


class Strict(OneEpoch):
    """Has torch raise where the host waits for a GPU, from the epoch's beginning to its end."""

    def on_epoch_begin(self, args, state, control, **_):
        torch.cuda.set_sync_debug_mode("error")

    def on_epoch_end(self, args, state, control, **_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("config", CONFIGS)
def test_no_step_waits_on_a_gpu(config, tmp_path):
    handle = patched(config)
    handle.model.to("cuda")
    history, strict = [], Strict()
    try:
        with undisturbed(handle.model), prepared(handle.model, ENGINE), selecting_rows(handle.model):
            LofitTrainer(
                handle,
                l1=0.1,
                on_epoch=history.append,
                callbacks=[strict],
                args=training_arguments(
                    handle.model, tmp_path, Schedule(1e-2, 2, batch_size=4), progress=False, prediction_loss_only=True
                ),
                train_dataset=Rows(rows(4 * STEPS)),
                data_collator=collator_of(ENGINE, 0, "index"),
            ).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.steps == 2 * STEPS
    assert history[1]["loss"] < history[0]["loss"]
