"""DPO's step on an accelerator: TRL's loss and logs, of which nothing is read before an epoch is over."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.causal_attention import CAUSAL
from lofit_fast.training.engine.device_queue import Sender
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.host_waits import META, EndOfEpoch, Made, OneEpoch, Waits, meta_as_an_accelerator, on_meta

pytest.importorskip("trl")
STEPS = 2


def pairs(count):
    from datasets import Dataset

    def ids(length, seed):
        return tokens(1, length, seed)[0].tolist()

    columns = {
        "prompt_ids": [ids(4 + n % 3, n) for n in range(count)],
        "chosen_ids": [ids(2 + n % 4, 90 + n) for n in range(count)],
        "rejected_ids": [ids(3 + n % 2, 190 + n) for n in range(count)],
        "ref_chosen_logps": [-9.0 - n for n in range(count)],
        "ref_rejected_logps": [-8.5 - n for n in range(count)],
    }
    return Dataset.from_dict(columns)


def trainer_of(handle, folder, callbacks=()):
    from trl import DPOConfig

    from lofit_fast.training.preference_trainer import AttachmentDPOTrainer

    more = {"precompute_ref_log_probs": True, "max_length": None, "disable_dropout": False, "bf16": False}
    more |= {"gradient_checkpointing": False, "beta": 0.5}
    schedule = Schedule(1e-2, 1, batch_size=4)
    return AttachmentDPOTrainer(
        handle,
        pairs(4 * STEPS),
        [list(range(4 * STEPS))],
        l1=0.1,
        on_epoch=lambda row: None,
        callbacks=list(callbacks),
        args=training_arguments(handle.model, folder, schedule, progress=False, kind=DPOConfig, **more),
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture
def handle():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale="all", offset="all"))
    randomize(handle, 0.3)
    return handle


def test_loss_gradients_and_logs_are_trls(handle, tmp_path):
    trainer = trainer_of(handle, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    model, found = handle.model.train(), []
    trainer.current_gradient_accumulation_steps = 1
    for sender in (None, Sender(torch.device("cpu"))):
        trainer.sender = sender
        loss = trainer.compute_loss(model, batch)
        logs = {}
        trainer.control.should_log = True
        trainer.log(logs)
        found.append((loss.detach(), torch.autograd.grad(loss, list(handle.parameters())), logs))
    (loss, gradients, logs), (mine, my_gradients, my_logs) = found
    assert mine.equal(loss)
    assert all(got.equal(wanted) for got, wanted in zip(my_gradients, gradients, strict=True))
    said = {name: value for name, value in logs.items() if name not in ("num_tokens", "epoch")}
    assert len(said) == 10
    assert {name: my_logs[name] for name in said} == pytest.approx(said, rel=1e-5)


def test_no_step_of_preferences_waits(handle, tmp_path, monkeypatch):
    meta_as_an_accelerator(monkeypatch)
    # TRL names a cache by all weights
    monkeypatch.setattr("trl.trainer.dpo_trainer.hash_module", lambda module: "")
    model = on_meta(handle.model)
    waits, made = Waits(META), Made(META)
    epoch = OneEpoch(waits, made)
    with prepared(model, Engine(attention=CAUSAL, packing=False, narrow=False, compile=False)):
        trainer = trainer_of(handle, tmp_path, [epoch])
        with waits, made, pytest.raises(EndOfEpoch):
            trainer.train()
    assert epoch.steps == STEPS
    assert not waits.seen + made.seen
