"""Training any attachment on completions: what is added to the loss, and what comes back."""

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers import jola, red
from lofit_fast.training import Engine
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.objectives import Completions
from lofit_fast.training.stage import train_attachment
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": f"q{n % 3}: ", "completion": "abc"[n % 3]} for n in range(12)]


def trained(attachment, folder, examples=EXAMPLES, engine=None, **changes):
    schedule = Schedule(**{"lr": 5e-2, "epochs": 3, "batch_size": 4, **changes})
    how = {"output_dir": folder, "engine": engine, "progress": False}
    return train_attachment(attachment, tiny_tokenizer(), Completions(examples), schedule, **how)


def vectors(attachment):
    return torch.cat([parameter.detach().flatten() for parameter in attachment.parameters()])


def test_stage_reports_an_epoch_each_and_leaves_the_modes_as_they_were(tmp_path):
    attachment = red.make(tiny_model("llama"))
    before = attachment.model.config.use_cache
    result = trained(attachment, tmp_path)
    assert len(result["loss"]) == 3
    assert result["loss"][-1] < result["loss"][0]
    assert result["seconds"] > 0 and result["examples_per_s"] > 0 and result["tokens_per_s"] > 0
    assert not attachment.model.training
    assert attachment.model.config.use_cache == before
    assert list(tmp_path.iterdir()) == []


def test_stage_takes_no_name_for_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attachment = red.make(tiny_model("llama"))
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        trained(attachment, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stage_is_reproducible_from_its_seed(tmp_path):
    results = []
    for seed in (1, 1, 2):
        attachment = jola.make(tiny_model("llama"))
        trained(attachment, tmp_path, seed=seed, epochs=1)
        results.append(vectors(attachment))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_stage_adds_penalties_to_what_is_minimised_and_not_to_the_loss(tmp_path):
    gates, losses = [], []
    for weight in (0.0, 10.0):
        attachment = jola.make(tiny_model("llama"), gate_weight=weight)
        losses.append(trained(attachment, tmp_path, max_grad_norm=1e9)["loss"][0])
        gates.append(torch.cat([edit.scale_gate.detach() for _, edit in attachment.hosts]))
    assert (gates[1] < gates[0] - 0.1).all()
    assert losses[1] < 10


def test_stage_trains_a_handle_with_an_l1_term(tmp_path):
    norms = []
    for l1 in (0.0, 10.0):
        handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale="all", init_std=0.1))
        trained(handle, tmp_path, l1=l1, lr=2e-2)
        norms.append(vectors(handle).abs().mean())
    assert norms[1] < norms[0] / 2


def test_stage_runs_on_the_engine_it_is_given(tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    seen = set()
    handle.model.register_forward_pre_hook(lambda m, _: seen.add(m.config._attn_implementation) if m.training else None)
    trained(handle, tmp_path, epochs=1, engine=Engine(attention="eager", compile=False, packing=False))
    assert seen == {"eager"}


def test_stage_refuses_what_cannot_be_trained(tmp_path):
    attachment = red.make(tiny_model("llama"))
    with pytest.raises(ValueError, match="empty"):
        trained(attachment, tmp_path, [])
    with pytest.raises(ValueError, match="tokens long"):
        trained(attachment, tmp_path, [{"prompt": "x" * 70, "completion": "y"}])
    with pytest.raises(ValueError, match="at least one epoch"):
        trained(attachment, tmp_path, epochs=0)
    attachment.unpatch()
    with pytest.raises(ValueError, match="parameters in its model"):
        trained(attachment, tmp_path)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"epochs": -1}, {"accumulation_steps": 3}])
def test_schedule_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="got|divide"):
        Schedule(**{"lr": 1e-2, "epochs": 1, **wrong})
