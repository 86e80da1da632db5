"""transformers' Trainer and accelerate with FSDP2 around a patched model: what one process trains, and checkpoints."""

import pytest
import torch

import lofit_fast as lf
from tests.oracle import randomize
from tests.patched_models import CONFIGS, relative
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model, tokens

accelerate = pytest.importorskip("accelerate", reason="no accelerate, which Trainer trains with")
pytestmark = pytest.mark.slow
ROWS = [{"input_ids": ids, "labels": ids} for ids in tokens(12, 11, 5)]
# of accelerate's configuration of FSDP2
HOW = {
    "as it is": {},
    "loaded once": {"cpu_ram_efficient_loading": True},
    "checkpointed": {"activation_checkpointing": True},
}


def shard_on_cpus():
    """accelerate shards where there are accelerators; here it is told that there are."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def begun(self, *args, fsdp_plugin=None, **options):
        made(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    def kind(self):
        sharded = self.__dict__.get("fsdp_plugin") is not None
        return DistributedType.FSDP if sharded else self.__dict__["distributed_type"]

    AcceleratorState.__init__ = begun
    AcceleratorState.distributed_type = property(kind, lambda self, value: self.__dict__.update(distributed_type=value))


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(handle, folder, n, how=None, steps=4, **options):
    """The losses of Trainer's steps, two epochs of two; checkpoints after each epoch."""
    from transformers import Trainer, TrainingArguments

    sharding = {}
    if how is not None:
        wrapped = type(handle.model.model.layers[0]).__name__
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [wrapped], **how}}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=6 // n,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_steps=2,
        max_grad_norm=0.02,
        disable_tqdm=True,
        **sharding,
    )
    callbacks = [lf.AdapterCheckpoints(handle, save_base=False)]
    trainer = Trainer(handle.model, arguments, train_dataset=ROWS, data_collator=collated, callbacks=callbacks)
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("how", HOW)
def test_trainer_shards_what_was_patched(how, tmp_path):
    """Losses and vectors; the vectors in each checkpoint, from which one process goes on."""
    handle = lf.patch(tiny_model("llama"), CONFIGS["both"])
    randomize(handle)
    handle.save(tmp_path / "start")
    losses = trained(handle, tmp_path / "one", 1)
    expected = handle.whole_vectors()

    def work(rank):
        shard_on_cpus()
        handle = lf.load(tiny_model("llama"), tmp_path / "start")
        assert trained(handle, tmp_path / "two", 2, HOW[how]) == pytest.approx(losses, rel=1e-5)
        assert handle.in_parts
        return max(relative(v, expected[key]) for key, v in handle.whole_vectors().items())

    assert max(in_processes(2, work, limit=200)) < 1e-5
    for step in (2, 4):
        one, two = (
            lf.load(tiny_model("llama"), tmp_path / name / f"checkpoint-{step}" / "lofit" / "adapter", strict=True)
            for name in ("one", "two")
        )
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        assert max(relative(got, want) for want, got in pairs) < 1e-5
