"""No step of a training makes the host wait for the device: shown on a device where waiting is impossible."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.data.collate import on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.engine import Engine, collator_of, prepared
from lofit_fast.training.engine.causal_attention import CAUSAL
from lofit_fast.training.engine.device_queue import Sender
from lofit_fast.training.trainer import LofitTrainer, Rows, undisturbed
from tests.tiny_models import tiny_model, tokens
from tests.training.host_waits import META, Made, Waits, on_meta

STEPS = 2


class EndOfEpoch(Exception):
    """Where the losses would be read."""


class OneEpoch(TrainerCallback):
    """Counts steps, has the modes count from the first epoch's beginning, and stops where it ends."""

    def __init__(self, *modes):
        self.steps, self.modes = 0, modes
        for mode in modes:
            mode.paused = True

    def on_epoch_begin(self, args, state, control, **_):
        for mode in self.modes:
            mode.paused = False

    def on_step_end(self, args, state, control, **_):
        self.steps += 1

    def on_epoch_end(self, args, state, control, **_):
        raise EndOfEpoch


def rows(count, longest=12):
    made = []
    for seed in range(count):
        ids, labelled = tokens(1, longest - seed % 5, seed)[0].tolist(), 2 + seed % 3
        made.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - labelled) + ids[-labelled:]})
    return made


def waits_of(handle, engine, folder, *, accumulation=1, l1=0.1, logits="index", longest=12, **more):
    """What the host waits for in an epoch's steps, by name. more: TrainingArguments' fields."""
    model = on_meta(handle.model)
    schedule = Schedule(1e-2, 2, batch_size=4, accumulation_steps=accumulation, l1=l1)
    waits, made = Waits(META), Made(META)
    epoch, data = OneEpoch(waits, made), rows(4 * STEPS, longest)
    with undisturbed(model), prepared(model, engine), selecting_rows(model):
        trainer = LofitTrainer(
            handle,
            l1=l1,
            on_epoch=lambda row: None,
            callbacks=[epoch],
            args=training_arguments(model, folder, schedule, progress=False, prediction_loss_only=True, **more),
            train_dataset=Rows(data),
            data_collator=collator_of(engine, 0, logits),
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
def meta_as_an_accelerator(monkeypatch):
    """The meta device has no autocast, which torch raises for when asked, and is not listed for fused optimizers."""
    optimizer = sys.modules["torch.optim.optimizer"]
    fused = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, fused.__name__, lambda: [*fused(), "meta"])
    asked, scope = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **more: nullcontext() if kind == "meta" else scope(kind, *args, **more)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "meta" and asked(device))


ENGINE = Engine(attention=CAUSAL, packing=False, narrow=True, compile=False)


def patched(config="both", family="llama"):
    return lf.patch(tiny_model(family), lf.LofitConfig(**CONFIGS[config]))


@pytest.mark.parametrize(("config", "accumulation"), [("step 1", 1), ("step 2", 1), ("both", 2)])
def test_no_step_waits(config, accumulation, tmp_path):
    assert not waits_of(patched(config), ENGINE, tmp_path, accumulation=accumulation)


# windows shorter than the rows and norms of heads; no narrowing
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_no_step_of_a_family_waits(family, tmp_path):
    assert not waits_of(patched(family=family), replace(ENGINE, narrow=family != "mistral"), tmp_path)


# each of these was in a step once, and is noticed here
WAITED = {
    "the filter for NaN": (ENGINE, {"logging_nan_inf_filter": True}, "item"),
    "whether there is padding": (replace(ENGINE, attention="sdpa"), {}, "item"),
    "a mask as an index": (replace(ENGINE, narrow=False), {"logits": "rows"}, "nonzero"),
    "a mask that is counted": (ENGINE, {"logits": "rows"}, "nonzero"),
}


@pytest.mark.parametrize("name", WAITED)
def test_what_waits_is_noticed(name, tmp_path):
    engine, options, says = WAITED[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=says):
        waits_of(patched(), engine, tmp_path, **options)


def test_copies_that_block_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Sender, "send", lambda self, batches: [on_device(batch, META) for batch in batches])
    # of each batch five tensors, and how many labels they have
    assert waits_of(patched(), ENGINE, tmp_path) == {"blocking _to_copy": 6 * STEPS}


def test_nothing_inside_our_operations_reads_a_value():
    # the meta device sees their outsides alone
    handle = patched()
    batch = collator_of(ENGINE, 0, "index")(rows(4))
    with prepared(handle.model, ENGINE), selecting_rows(handle.model), Waits("cpu") as waits:
        handle.model(**batch, use_cache=False).loss.backward()
    assert not waits.seen
    assert all(parameter.grad.abs().sum() > 0 for parameter in handle.parameters())
