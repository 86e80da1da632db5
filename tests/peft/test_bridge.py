"""LoFiT as a method of PEFT against `lofit_fast.patch`: the same numbers, by PEFT's calls."""

import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lofit_fast as lf
import lofit_fast.peft as bridge
from lofit_fast.patching.storage import PEFT_TYPE
from lofit_fast.peft import LofitPeftConfig, LofitPeftLayer
from lofit_fast.peft.registration import register
from tests.patched_models import CONFIGS, SOME, logits, loss, relative, snapshot
from tests.peft.peft_models import add_adapter, base_of, fill, quietly
from tests.several_processes import in_processes
from tests.tiny_models import HEADS, LAYERS, tiny_model, tokens

NEAR = 1e-5


def peft_config(name: str, **more) -> LofitPeftConfig:
    config = CONFIGS[name]
    return LofitPeftConfig(scale=config.scale, offset=config.offset, task_type="CAUSAL_LM", **more)


def adapted(name: str = "both", family: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
    return get_peft_model(tiny_model(family, dtype), peft_config(name)).eval()


def vectors(model: nn.Module, adapter: str = "default") -> dict[tuple[int, str], nn.Parameter]:
    layers = base_of(model).model.layers
    found = {}
    for number, layer in enumerate(layers):
        projection = layer.self_attn.o_proj
        for component in ("scale", "offset"):
            table = getattr(projection, f"lofit_{component}", {})
            if adapter in table:
                found[number, component] = table[adapter]
    return found


def twin_of(model: nn.Module, name: str = "both", family: str = "llama", dtype: torch.dtype = torch.float32):
    """The same by `lofit_fast.patch`, with the same vectors."""
    handle = lf.patch(tiny_model(family, dtype), CONFIGS[name])
    with torch.no_grad():
        for (component, number), rows in handle.vectors().items():
            rows.copy_(vectors(model)[number, component])
    return handle


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


def spoilt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(iter(vectors(model).values())).fill_(float("nan"))
    return model


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


def test_the_two_folders_are_one(tmp_path):
    model = adapted()
    fill(model)
    on = logits(model)
    model.save_pretrained(tmp_path / "peft")
    handle = lf.load(tiny_model("llama"), tmp_path / "peft")
    assert torch.equal(logits(handle.model), on)
    handle.save(tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits(again), on)
    assert again.peft_config["default"].heads() == CONFIGS["both"]
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert all(written[1][key] == value for key, value in written[0].items() if key != "base_model_name_or_path")


def flip(path, at=-5):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# transformers' own load_adapter reads the tensors by itself, and asks nobody
LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_model("llama"), folder),
    "load_adapter": lambda folder: adapted().load_adapter(folder, "second"),
    "lofit_fast": lambda folder: lf.load(tiny_model("llama"), folder),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("writer", ["handle", "peft"])
def test_a_flipped_bit_is_noticed_whoever_writes_and_reads(writer, loader, tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path) if writer == "peft" else twin_of(model).save(tmp_path)
    LOADERS[loader](tmp_path)
    flip(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        LOADERS[loader](tmp_path)


def test_a_config_that_was_damaged_is_noticed(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    content["offset"][0][1] ^= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged, or was changed by hand"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_folders_without_digests_load_and_numbers_that_are_not_finite_do_not(tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if "digest" not in k}
    path.write_text(json.dumps(content))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()), logits(model))
    spoilt(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has numbers that are not finite"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_the_digests_of_a_folder_that_was_read_are_not_written_again(tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "first", is_trainable=True)
    fill(again, seed=9)
    again.save_pretrained(tmp_path / "second")
    got = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "second").eval()
    assert torch.equal(logits(got), logits(again.eval()))
    # a config alone says nothing of tensors
    again.peft_config["default"].save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "adapter_config.json").read_text())["tensor_digest"] is None


def test_an_adapter_whose_save_was_killed_before_its_config_is_the_new_one(tmp_path):
    for name, seed in (("old", 1), ("new", 2)):
        handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(seed, seed)]))
        fill(handle.model, seed=seed)
        handle.save(tmp_path / name)
    (tmp_path / "new" / "adapter_model.safetensors").replace(tmp_path / "old" / "adapter_model.safetensors")
    got = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "old").eval()
    assert got.peft_config["default"].offset == ((2, 2),)
    assert torch.equal(logits(got), logits(handle.model))


def test_another_base_is_a_warning(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained on other weights than this model has"):
        PeftModel.from_pretrained(tiny_model("llama", seed=4), tmp_path)


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_into_16_bits_rounds_nothing(tmp_path, low_memory):
    model = adapted(dtype=torch.bfloat16)
    fill(model)
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(again), logits(model))


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


def saved_base(folder) -> nn.Module:
    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# what a user tries first, on either folder
@pytest.mark.parametrize("writer", ["handle", "peft"])
def test_transformers_loads_the_folder(writer, tmp_path):
    base = saved_base(tmp_path / "base")
    if writer == "handle":
        handle = lf.patch(base, CONFIGS["both"])
        fill(base)
        handle.save(tmp_path / "adapter")
        model = base
    else:
        model = get_peft_model(base, peft_config("both"))
        fill(model)
        model.save_pretrained(tmp_path / "adapter")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(got), logits(model))
    assert isinstance(got.model.layers[1].self_attn.o_proj, LofitPeftLayer)


UNREGISTERED = """
import sys, peft, lofit_fast, transformers
assert "LOFIT" not in peft.PeftType.__members__
for load in (transformers.AutoModelForCausalLM.from_pretrained, peft.PeftConfig.from_pretrained):
    try:
        load(sys.argv[1])
    except KeyError as error:
        print(error)
"""


MESSAGE = r"lofit_fast\.load\(model, folder\), or import lofit_fast\.peft"


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, PeftConfig.from_pretrained])
def test_without_the_bridge_the_error_says_what_to_do(load, tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base")
    lf.patch(base, CONFIGS["both"]).save(tmp_path / "adapter")
    for name in ("LOFIT", PEFT_TYPE):
        monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, name)
    with pytest.raises(KeyError, match=MESSAGE):
        load(tmp_path / "adapter")


@pytest.mark.slow
def test_importing_lofit_fast_registers_nothing(tmp_path):
    base = saved_base(tmp_path / "base")
    lf.patch(base, CONFIGS["both"]).save(tmp_path / "adapter")
    command = [sys.executable, "-c", UNREGISTERED, str(tmp_path / "adapter")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 2
    assert all(re.search(MESSAGE, line) for line in shown)


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
