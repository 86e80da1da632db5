"""The adapter in the checkpoints of other people's trainers: resumed, the best one restored, never lost in silence."""

import json
import shutil
import warnings
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

import lofit_fast as lf
from tests.patched_models import snapshot
from tests.tiny_models import tiny_model, tokens
from tests.training.stock_trainers import (
    CONFIG,
    TRAINERS,
    patched,
    stock,
    told,
    vectors,
)


class StopAt(TrainerCallback):
    """Ends a run after a step, as a killed job would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


# TRL's own DPO loads a second model; ours, a subclass, stays in the quick run
EACH = [name if name != "DPOTrainer" else pytest.param(name, marks=pytest.mark.slow) for name in TRAINERS]
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    # the loss falls: the greatest is the first, so that the best vectors are not the last
    "greater_is_better": True,
}


# train() is given a folder, a flag, a folder that was moved, a checkpoint without the base's weights
WAYS = [
    *((name, "path") for name in ("Trainer", "SFTTrainer", "ReferencedDPOTrainer")),
    pytest.param("DPOTrainer", "path", marks=pytest.mark.slow),
    *(("Trainer", how) for how in ("true", "moved", "without_base")),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trainer -> the handle that it has trained in one go."""

    @cache
    def trained(trainer):
        handle = patched()
        TRAINERS[trainer](handle, tmp_path_factory.mktemp("whole"), [lf.AdapterCheckpoints(handle)]).train()
        return handle

    return trained


@pytest.mark.parametrize("trainer, how", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(trainer, uninterrupted, tmp_path, how):
    build, whole = TRAINERS[trainer], uninterrupted(trainer)
    options = {"save_base": how != "without_base"}
    first = patched()
    build(first, tmp_path / "cut", [lf.AdapterCheckpoints(first, **options), StopAt(2)]).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    if how == "moved":
        checkpoint = shutil.move(checkpoint, tmp_path / "elsewhere")
    second = patched(seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(second, tmp_path / "cut", [lf.AdapterCheckpoints(second, **options)])
        trainer.train(resume_from_checkpoint=True if how == "true" else str(checkpoint))
    assert told(caught) == []
    assert trainer.state.global_step == 4
    assert not torch.equal(vectors(whole), vectors(first))
    assert torch.equal(vectors(whole), vectors(second))


@pytest.mark.parametrize("trainer", EACH)
def test_the_best_vectors_are_restored(trainer, tmp_path):
    handle, build = patched(), TRAINERS[trainer]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(handle, tmp_path, [lf.AdapterCheckpoints(handle)], **BEST)
        trainer.train()
    assert told(caught) == []
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = {n: lf.load(tiny_model("llama"), tmp_path / f"checkpoint-{n}" / "lofit" / "adapter") for n in (2, 4)}
    assert not torch.equal(vectors(saved[2]), vectors(saved[4]))
    assert torch.equal(vectors(handle), vectors(saved[2]))
    assert torch.equal(vectors(handle), vectors(lf.load(tiny_model("llama"), tmp_path / "lofit" / "adapter")))


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainers_activation_checkpointing_trains_the_same(tmp_path, reentrant):
    plain, handle = patched(), patched()
    stock(plain, tmp_path, []).train()
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    stock(handle, tmp_path, [], **how).train()
    assert (vectors(plain) - vectors(patched())).abs().max() > 0.1
    torch.testing.assert_close(vectors(handle), vectors(plain), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_still_reloads_as_the_base(tmp_path):
    handle = patched()
    stock(handle, tmp_path, [lf.AdapterCheckpoints(handle)]).train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tiny_model("llama").parameters(), strict=True))


def test_checkpoints_without_the_base_are_small_and_keep_what_else_is_trained(tmp_path):
    handle = patched()
    handle.model.model.norm.weight.requires_grad_(True)
    stock(handle, tmp_path, [lf.AdapterCheckpoints(handle, save_base=False)]).train()
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert list(kept) == ["model.norm.weight"]
    assert torch.equal(kept["model.norm.weight"], handle.model.model.norm.weight)


def resume_alone(handle, folder):
    stock(handle, folder, []).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def best_alone(handle, folder):
    stock(handle, folder, [], **BEST).train()


def sharded(handle, folder):
    from transformers.trainer_utils import load_sharded_checkpoint

    handle.model.save_pretrained(folder / "shards", max_shard_size="20KB")
    load_sharded_checkpoint(handle.model, folder / "shards", strict=False)


def accelerated(handle, folder):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(handle.model)
    accelerator.save_state(folder / "state")
    accelerator.load_state(folder / "state")


LOADS = {
    "whole model": lambda handle, _: handle.model.load_state_dict(tiny_model("llama").state_dict()),
    "decoder": lambda handle, _: handle.model.model.load_state_dict(tiny_model("llama").model.state_dict()),
    "assigned": lambda handle, _: handle.model.load_state_dict(tiny_model("llama").state_dict(), assign=True),
    "wrapped": lambda handle, _: nn.Sequential(handle.model).load_state_dict(
        nn.Sequential(tiny_model("llama")).state_dict()
    ),
    "Trainer's best": best_alone,
    "Trainer resumes": resume_alone,
    "shards": sharded,
    "accelerate": accelerated,
}


@pytest.mark.parametrize("load", LOADS)
def test_loading_without_the_vectors_is_loud(load, tmp_path):
    if load == "Trainer resumes":
        stock(patched(), tmp_path, [], max_grad_norm=0.0).train()
    handle = patched()
    with pytest.warns(UserWarning, match="AdapterCheckpoints"):
        LOADS[load](handle, tmp_path)


NEXT = {"forward": lambda handle, _: handle.model(tokens()), "save": lambda handle, folder: handle.save(folder)}


@pytest.mark.parametrize("use", NEXT)
def test_a_trusted_callback_that_does_nothing_is_told_at_the_next_use(tmp_path, use):
    handle = patched()
    callback = lf.AdapterCheckpoints(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.model.load_state_dict(tiny_model("llama").state_dict())
    with pytest.warns(UserWarning, match="AdapterCheckpoints"):
        NEXT[use](handle, tmp_path)
    # once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NEXT[use](handle, tmp_path)
    assert callback.handle is handle


def test_an_unpatched_model_loads_in_silence():
    before = snapshot(tiny_model("llama")).keys()
    handle = patched()
    model = handle.unpatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(tiny_model("llama").state_dict())
    assert snapshot(model).keys() == before


@pytest.mark.parametrize(
    "write, changes, message",
    [
        (False, {}, "written without AdapterCheckpoints"),
        (True, {"offset": ((0, 1), (1, 3), (2, 1))}, "vectors of other heads"),
        # torch's own refusal comes first where the number of parameters differs
        (True, {"scale": None}, "doesn't match the size of optimizer's group"),
    ],
)
def test_resuming_from_what_does_not_fit_is_refused(tmp_path, write, changes, message):
    first = patched()
    stock(first, tmp_path, [lf.AdapterCheckpoints(first)] if write else []).train()
    handle = patched(**changes)
    before = vectors(handle)
    trainer = stock(handle, tmp_path, [lf.AdapterCheckpoints(handle)])
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(vectors(handle), before)


def test_the_callback_of_another_model_is_refused(tmp_path):
    handle, other = patched(), patched()
    with pytest.raises(ValueError, match="another model"):
        stock(handle, tmp_path, [lf.AdapterCheckpoints(other)]).train()
    with pytest.raises(ValueError, match="no patched model"):
        lf.AdapterCheckpoints()._find(tiny_model("llama"))
    with pytest.raises(TypeError, match="expected the handle"):
        lf.AdapterCheckpoints(handle.model)
    handle.unpatch()
    with pytest.raises(ValueError, match="has ended"):
        lf.AdapterCheckpoints(handle)


def test_transformers_may_build_the_callback_anew(tmp_path):
    whole = patched()
    stock(whole, tmp_path, [lf.AdapterCheckpoints(whole)]).train()
    again = patched(seed=7)
    trainer = stock(again, tmp_path, [lf.AdapterCheckpoints(again)], restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(vectors(whole), vectors(again))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["AdapterCheckpoints"]["heads"]["scale"] == [[1, 2]]


def test_lora_beside_lofit_resumes_too(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    def both(seed=42):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
        handle = lf.patch(model, CONFIG)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        return handle

    def trained(handle):
        return [p.detach().clone() for p in handle.model.parameters() if p.requires_grad]

    whole = both()
    stock(whole, tmp_path, [lf.AdapterCheckpoints(whole)]).train()
    again = both(seed=3)
    stock(again, tmp_path, [lf.AdapterCheckpoints(again)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(trained(whole)) == 4 + 6
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))


def test_of_several_adapters_the_handles_own_is_kept(tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 1)], init_std=0.1))
    handle.add("other", lf.LofitConfig(offset=[(1, 2)]))
    callback, begun = lf.AdapterCheckpoints(handle), SimpleNamespace(is_hyper_param_search=False, global_step=0)
    callback.on_train_begin(None, begun, None, model=handle.model)
    handle.set_active("other")
    with pytest.raises(ValueError, match="cannot keep checkpoints while 'other' is active"):
        callback.on_train_begin(None, begun, None, model=handle.model)
    # it may have been made active since
    where = SimpleNamespace(load_best_model_at_end=False, should_save=True, output_dir=str(tmp_path))
    callback.on_train_end(where, begun, None)
    assert lf.load(tiny_model("llama"), tmp_path / "lofit" / "adapter").config.offset == ((0, 1),)
