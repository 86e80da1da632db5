"""A run goes on with its own base alone: what modules compute with beside their weights is part of it."""

import json

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.base_of_run import as_now, numbers_of
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import fit

QUICKEST = lf.Recipe(tune_epochs=0)


def rotary(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def rotary_scaling(model):
    model.model.rotary_emb.attention_scaling = 2.0


def one_attention(model):
    model.model.layers[1].self_attn.scaling *= 2


def norm(model):
    model.model.norm.variance_epsilon = 0.1


def dropout(model):
    model.model.layers[0].self_attn.attention_dropout = 0.5


def embedding(model):
    model.model.embed_tokens.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)


def run(model, folder, **options):
    fit(model, folder, QUICKEST, heads=[(0, 0)], **options).handle.unpatch()


@pytest.mark.parametrize(
    "change",
    (rotary, *(pytest.param(c, marks=pytest.mark.slow) for c in (rotary_scaling, one_attention, norm, dropout))),
)
def test_a_base_that_computes_otherwise_is_another(tmp_path, change):
    run(tiny_model("llama"), tmp_path)
    other = tiny_model("llama")
    change(other)
    with pytest.raises(ValueError, match=r"another model: .*what differs is model\.numbers\.\w+$"):
        run(other, tmp_path)
    run(tiny_model("llama"), tmp_path)


@pytest.mark.slow
def test_a_setting_is_named(tmp_path):
    run(tiny_model("llama"), tmp_path)
    other = tiny_model("llama")
    other.config.rope_parameters["rope_theta"] = 7.0
    with pytest.raises(ValueError, match=r"what differs is model\.settings\.rope_parameters\.rope_theta$"):
        run(other, tmp_path)


@pytest.mark.slow
def test_step_1_of_another_base_is_not_shared(tmp_path):
    recipe = lf.Recipe(top=2, select="random", tune_epochs=0)
    for number in range(2):
        model = tiny_model("llama")
        if number:
            one_attention(model)
        fit(model, tmp_path / str(number), recipe, step1_dir=tmp_path / "step1").handle.unpatch()
    assert len(list((tmp_path / "step1").glob("*/state.json"))) == 2


def test_what_says_nothing_of_the_base(tmp_path):
    """Last bits of another machine, entries that another version lacks or adds, modes, and an older run."""
    model = tiny_model("llama")
    run(model, tmp_path)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.rotary_emb.inv_freq.mul_(1 + 1e-6)
    embedding(model)
    run(model, tmp_path)
    now = {"base": "", "settings": {}, "numbers": {"scaling": [0.25]}}
    assert as_now(now)({"model": {}})["model"] == now
    assert as_now(now)({"model": {"numbers": {"gone": [1.0]}}})["model"] == now
    for damaged in (0.25, [], ["x"], [0.25, 0.5], None, {}):
        assert as_now(now)({"model": {"numbers": {"scaling": damaged}}})["model"]["numbers"] == {"scaling": damaged}


def test_angles_that_follow_the_text_are_left_out():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model("llama", rope_parameters=parameters, max_position_embeddings=16)
    before = numbers_of(model)
    model(torch.randint(3, 90, (1, 40)))
    assert numbers_of(model) == before
    json.dumps(before)


@pytest.mark.slow
def test_an_adapter_of_peft_is_part_of_the_base(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model

    run(adapted(0), tmp_path)
    with pytest.raises(ValueError, match=r"model\.adapters"):
        run(adapted(1), tmp_path)
    with pytest.raises(ValueError, match=r"model\.adapters"):
        run(tiny_model("llama"), tmp_path)
