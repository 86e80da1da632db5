"""What every rival does: it can be switched off and taken out, it is counted, and the trained ones learn."""

import math

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.rivals import RIVALS
from lofit_fast.tasks.task import Preference
from lofit_fast.training.supervised import train_supervised
from tests.benchmarks.peers.edited import logits, shake
from tests.benchmarks.peers.test_iti import CONTRASTS
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": c.prompt, "completion": c.right} for c in CONTRASTS]
TRAINED = [name for name, rival in RIVALS.items() if rival.kind == "trained"]


def made(name, model, **options):
    rival = RIVALS[name]
    given = (tiny_tokenizer(), CONTRASTS) if rival.kind == "fitted" else ()
    return rival.make(model, *given, seed=3, **{**rival.options, **options})


@pytest.fixture(params=RIVALS)
def name(request):
    """Each rival in turn."""
    return request.param


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rival_can_be_switched_off_and_taken_out(name, family):
    model = tiny_model(family)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    base, modules = logits(model), dict(model.named_modules())
    frozen = {key: p.requires_grad for key, p in model.named_parameters()}
    hooks = {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in modules.items()}
    attachment = made(name, model)
    shake(attachment)
    assert attachment.model is model
    assert not torch.equal(logits(model), base)
    with attachment.disabled():
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)
    assert attachment.unpatch() is model
    assert dict(model.named_modules()) == modules
    assert {key: p.requires_grad for key, p in model.named_parameters()} == frozen
    assert {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in modules.items()} == hooks
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", TRAINED)
def test_rival_learns_and_trains_nothing_else(name, tmp_path):
    model = tiny_model("llama")
    before = {key: p.clone() for key, p in model.named_parameters()}
    attachment = made(name, model)
    own = {id(p) for p in attachment.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert attachment.n_parameters() == sum(p.numel() for p in attachment.parameters())
    options = {"epochs": 6, "batch_size": 4, "output_dir": tmp_path, "progress": False}
    loss = train_supervised(attachment, tiny_tokenizer(), EXAMPLES, lr=RIVALS[name].lr, **options)["loss"]
    assert loss[-1] < loss[0] - 0.02
    attachment.unpatch()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_rival_learns_preferences(name, tmp_path):
    pytest.importorskip("trl")
    from lofit_fast.training.preferences import train_dpo

    model = tiny_model("llama")
    before = logits(model)
    attachment = made(name, model)
    preferences = [Preference(c.prompt, c.right, (c.wrong,)) for c in CONTRASTS]
    options = {"epochs": 4, "batch_size": 4, "output_dir": tmp_path, "progress": False}
    trained = train_dpo(attachment, tiny_tokenizer(), preferences, lr=RIVALS[name].lr, **options)
    # the loss of a model that is its own reference is log 2
    assert trained["loss"][-1] < trained["loss"][0] < math.log(2) + 0.1
    assert trained["examples_per_s"] > 0
    attachment.unpatch()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_rival_refuses_an_edited_model(name, llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    with pytest.raises(ValueError, match="edited already"):
        made(name, llama)
    handle.unpatch()
    made(name, llama)
    with pytest.raises(ValueError, match="edited already"):
        made(name, llama)


def test_rival_has_tuning_settings_it_takes(name):
    rival = RIVALS[name]
    assert len(rival.tuning) >= 4
    assert len({str(setting) for setting in rival.tuning}) == len(rival.tuning)
    for setting in rival.tuning:
        attachment = made(name, tiny_model("llama"), **{k: v for k, v in setting.items() if k != "lr"})
        assert attachment.n_parameters() > 0
    assert (rival.lr > 0) == (rival.kind == "trained")
    assert {"lr"} <= set(rival.tuning[0]) or rival.kind == "fitted"
