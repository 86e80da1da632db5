"""LoFiT as a method of PEFT against `lofit_fast.patch`: the same numbers, by PEFT's calls."""

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftType
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lofit_fast as lf
import lofit_fast.peft as bridge
from lofit_fast.peft import LofitPeftConfig
from lofit_fast.peft.registration import register
from tests.patched_models import CONFIGS, SOME, logits, loss, relative, snapshot
from tests.peft.bridge_models import adapted, peft_config, spoilt, twin_of, vectors
from tests.peft.peft_models import add_adapter, base_of, fill, quietly
from tests.several_processes import in_processes
from tests.tiny_models import HEADS, LAYERS, tiny_model, tokens

NEAR = 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bridge_computes_what_patch_computes(name, family):
    model = adapted(name, family)
    drawn = lf.patch(tiny_model(family), CONFIGS[name])
    ours = vectors(model)
    assert all(torch.equal(p, ours[number, component]) for (component, number), p in drawn.vectors().items())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in ours.values()}
    fill(model)
    handle = twin_of(model, name, family)
    loss(model).backward()
    loss(handle.model).backward()
    with torch.no_grad():
        assert torch.equal(logits(model), logits(handle.model))
    for (component, number), rows in handle.vectors().items():
        assert relative(ours[number, component].grad, rows.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_vectors_keep_their_precision(dtype):
    model = adapted(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in vectors(model).values()} == {wide}
    fill(model)
    assert torch.equal(logits(model), logits(twin_of(model, dtype=dtype).model))
    assert {p.dtype for p in vectors(model.to(torch.bfloat16)).values()} == {torch.float32}


def test_everyday_calls(tmp_path):
    model = adapted()
    fill(model)
    base, on = logits(tiny_model("llama")), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.add_adapter("second", peft_config("offset_some", seed=7))
    assert torch.equal(logits(model), on)
    model.set_adapter("second")
    with torch.no_grad():
        for rows in vectors(model, "second").values():
            rows.copy_(torch.randn_like(rows))
    second = logits(model)
    assert relative(second, on) > 1e-3
    # the active one alone is trained
    loss(model).backward()
    assert all(p.grad is not None for p in vectors(model, "second").values())
    assert all(p.grad is None for p in vectors(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(again), on)
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again.eval()), second)
    # PEFT takes one that remains
    quietly(again.delete_adapter, "second")
    assert torch.equal(logits(again), on)
    assert again.active_adapters == ["default"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model = adapted()
    fill(model)
    on = logits(model)
    again = copied(model)
    fill(model, seed=8)
    assert torch.equal(logits(again), on)
    assert torch.equal(logits(again.unload()), logits(tiny_model("llama")))


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_and_unload_is_handle_merge(name, tmp_path):
    model = adapted(name)
    fill(model)
    expected = twin_of(model, name).merge()
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[0].self_attn.o_proj) is nn.Linear
    assert torch.equal(logits(merged), logits(expected))
    assert merged.config.attention_bias == expected.config.attention_bias
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


def test_merging_refuses_what_stands_around_our_layer():
    model = adapted()
    fill(model)
    layer = base_of(model).model.layers[1].self_attn.o_proj
    hook = layer.register_forward_hook(lambda module, args, output: 2 * output)
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot merge layer 1: its projection, .* has forward hooks on it"):
        model.merge_and_unload()
    assert base_of(model).model.layers[1].self_attn.o_proj is layer and torch.equal(logits(model), expected)
    hook.remove()
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) < NEAR


def test_unload_gives_the_same_objects_back():
    model = tiny_model("llama")
    before = snapshot(model.requires_grad_(False))
    assert get_peft_model(model, peft_config("both")).unload() is model
    del model.config.pretraining_tp
    assert {k: v for k, v in snapshot(model).items() if k != "config"} == {
        k: v for k, v in before.items() if k != "config"
    }


# one that has biases merges in place, and comes back bit for bit
def test_merging_for_the_time_being():
    base = tiny_model("llama", attention_bias=True)
    fill(base)
    model = get_peft_model(base, peft_config("both"))
    fill(model)
    state, on = copy.deepcopy(model.state_dict()), logits(model)
    model.merge_adapter()
    assert relative(logits(model), on) < NEAR
    assert not torch.equal(model.state_dict()["base_model.model.model.layers.1.self_attn.o_proj.base_layer.weight"], on)
    model.unmerge_adapter()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.merge_adapter()
    assert relative(logits(model.merge_and_unload()), on) < NEAR


def lora_on_the_projection() -> nn.Module:
    return get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["o_proj"])).base_model.model


def patched() -> nn.Module:
    model = tiny_model("llama")
    lf.patch(model, CONFIGS["both"])
    return model


def made_for_another() -> LofitPeftConfig:
    config = peft_config("both")
    get_peft_model(tiny_model("llama", hidden_size=48), config)
    return config


REFUSED = {
    "head": (lambda: tiny_model("llama"), lambda: LofitPeftConfig(offset=[(0, HEADS)]), "offset names heads"),
    "layer": (lambda: tiny_model("llama"), lambda: LofitPeftConfig(scale=[(LAYERS, 0)]), "scale names heads"),
    "no_decoder": (lambda: nn.Sequential(nn.Linear(2, 2)), lambda: peft_config("both"), "Hugging Face model"),
    "patched": (patched, lambda: peft_config("both"), r"patched by lofit_fast.patch: unpatch\(\)"),
    "lora": (lora_on_the_projection, lambda: peft_config("both"), "another adapter of PEFT: merge it first"),
    "another": (lambda: tiny_model("llama"), made_for_another, "for another model: it was made for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(case):
    build, config, message = REFUSED[case]
    model, config = build(), config()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=message):
        quietly(inject_adapter_in_model, config, model)
    assert snapshot(model) == before


def test_nothing_to_adapt_is_refused():
    with pytest.raises(ValueError, match="nothing to adapt"):
        LofitPeftConfig()


CALLS = {
    "weighted": (lambda m: m.add_weighted_adapter(["default"], [1.0], "sum"), "no weighted sum of adapters"),
    "several": (lambda m: m.base_model.set_adapter(["default", "second"]), "one active adapter at a time"),
    "per_row": (lambda m: m(tokens(), adapter_names=["default", "second"]), "one active adapter for all rows"),
    "merge_two": (lambda m: m.merge_and_unload(adapter_names=["default", "second"]), "merges one adapter at a time"),
    "in_place": (lambda m: m.merge_adapter(), r"has no bias to take them. merge_and_unload\(\)"),
    "not_finite": (lambda m: spoilt(m).merge_and_unload(safe_merge=True), "not finite"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_make_no_sense_are_refused(call):
    action, message = CALLS[call]
    model = adapted()
    model.add_adapter("second", peft_config("offset_some"))
    if call == "not_finite":
        spoilt(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        action(model)
    assert snapshot(model) == before


def test_merging_into_what_is_not_plain_is_refused():
    model = tiny_model("llama")
    odd = type("Odd", (nn.Linear,), {})
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = odd
    held = get_peft_model(model, peft_config("both"))
    before = snapshot(held)
    with pytest.raises(ValueError, match="cannot merge layer 0: expected a plain nn.Linear, got Odd"):
        held.merge_and_unload()
    assert snapshot(held) == before


def test_the_reference_that_trl_adds_is_a_copy():
    model = adapted()
    fill(model)
    on = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("second", model.peft_config["default"])
    for name, expected in (("ref", on), ("second", logits(adapted()))):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval()), expected)
    fill(model)
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), on)


# PEFT reads no config where an adapter of the name is there
@pytest.mark.parametrize("name", ["scale_all", "offset_some"])
def test_other_heads_do_not_load_into_an_adapter(name, tmp_path):
    adapted(name).save_pretrained(tmp_path)
    model = adapted("both")
    fill(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot load into adapter 'default', which adapts other heads in . places"):
        model.load_adapter(tmp_path, "default")
    assert snapshot(model) == before
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model.eval()), logits(adapted(name)))


def test_registering_twice_changes_nothing():
    members = list(PeftType)
    register()
    assert list(PeftType) == members
    assert PeftType("LOFIT") is PeftType.LOFIT is PeftType["LOFIT"]
    assert pickle.loads(pickle.dumps(PeftType.LOFIT)) is PeftType.LOFIT
    assert importlib.import_module("lofit_fast.peft") is bridge


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        row = tokens(batch=4)[index]
        return {"input_ids": row, "labels": row}


def trainer_of(model: nn.Module, folder) -> Trainer:
    how = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(folder, max_steps=3, save_steps=2, logging_steps=1, **how)
    return Trainer(model, arguments, train_dataset=Rows())


def test_stock_trainer_trains_saves_and_resumes(tmp_path):
    model = adapted()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-2").eval()
    resumed = trainer_of(adapted(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(vectors(model).values(), vectors(resumed.model).values(), strict=True))
    assert relative(logits(loaded), logits(model.eval())) > 0


# Trainer asks whether a quantized base has adapters of PEFT on it
def test_stock_trainer_accepts_a_quantized_base(tmp_path):
    base = tiny_model("llama")
    base.is_quantized, base.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(base, tmp_path)
    trainer_of(get_peft_model(base, peft_config("offset_some")), tmp_path)


def test_the_model_takes_it_without_a_peft_model(tmp_path):
    model = tiny_model("llama")
    add_adapter(model, LofitPeftConfig(offset=SOME), "mine")
    with torch.no_grad():
        for rows in vectors(model, "mine").values():
            rows.copy_(torch.randn_like(rows))
    on = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = tiny_model("llama")
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), on)


def replicated(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for a device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replicated(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return replica


def test_a_replica_computes_with_vectors_of_its_own():
    layer = base_of(adapted()).model.layers[SOME[0][0]].self_attn.o_proj
    fill(layer)
    z = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        expected, replica = layer(z), replicated(layer)
        assert torch.equal(replica(z), expected) and replica._patched.keys() == layer._patched.keys()
        next(iter(replica.lofit_offset.values())).zero_()
        assert not torch.equal(replica(z), expected) and torch.equal(layer(z), expected)


def test_vectors_that_come_after_what_averages_gradients_are_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")

    def work(rank):
        cpu = torch.device("cpu")
        inside, around = tiny_model("llama"), tiny_model("llama")
        inside.model.layers[1] = fsdp.FullyShardedDataParallel(inside.model.layers[1], device_id=cpu)
        fsdp.fully_shard(nn.Sequential(around))
        whole = fsdp.FullyShardedDataParallel(tiny_model("llama"), use_orig_params=True, device_id=cpu)
        for sharded in (fsdp.fully_shard(tiny_model("llama")), inside, around, whole):
            with pytest.raises(ValueError, match="is sharded .*: put the adapter in first"):
                get_peft_model(sharded, peft_config("offset_some"))
        model, ids = tiny_model("llama"), tokens(2, 5, seed=rank)
        wrapped = nn.parallel.DistributedDataParallel(model)
        held = get_peft_model(wrapped.module, peft_config("offset_some"))
        with pytest.raises(ValueError, match="DistributedDataParallel does not know"):
            wrapped(ids, labels=ids)
        wrapped = nn.parallel.DistributedDataParallel(held)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in held.parameters() if p.requires_grad]

    one, other = in_processes(2, work)
    assert one and all(map(torch.equal, one, other))
