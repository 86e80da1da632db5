"""One step of LoFiT on transformers.Trainer: the L1 term, the optimizer, the checkpoints, and a loss that diverges."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

import lofit_fast as lf
from lofit_fast.models.label_counts import divides_by_count
from lofit_fast.patching.storage import read_adapter
from lofit_fast.training import LofitTrainer, objectives
from lofit_fast.training.trainer import AttachmentTraining
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.small_trainers import COLLATE, rows, scaled, trainer_on

L1 = 0.05


def vectors(handle):
    return torch.cat([parameter.detach().flatten() for parameter in handle.parameters()])


# the second count leaves one micro-batch for the last step
@pytest.mark.parametrize("count", [24, 28])
def test_trainer_accumulation_changes_nothing(tmp_path, count):
    results, histories = [], []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        handle, history = scaled(), []
        trainer = trainer_on(
            handle,
            tmp_path,
            count,
            L1,
            history,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        assert trainer.state.global_step == math.ceil(count / 8)
        results.append(vectors(handle))
        histories.append(history)
    assert (results[0] - vectors(scaled())).abs().max() > 1e-2
    assert (results[0] - results[1]).abs().max() <= 1e-6
    for key in ("loss", "l1"):
        assert histories[0][0][key] == pytest.approx(histories[1][0][key], rel=1e-6)


class OwnMean(LlamaForCausalLM):
    """Takes the number of labels, and computes a mean all the same."""

    def forward(self, num_items_in_batch=None, **given):
        return super().forward(**given)


def counting(kind):
    model = tiny_model("llama")
    if kind == "own mean":
        model.__class__ = OwnMean
    elif kind == "no number":
        model.accepts_loss_kwargs = False
    return model


@pytest.mark.parametrize("kind", ["own mean", "no number"])
def test_accumulation_changes_nothing_whatever_a_model_makes_of_the_count(kind, tmp_path):
    example = [{"prompt": f"{a}=", "completion": a * (1 + i % 4)} for i, a in enumerate("abcdefghijk")]
    found = []
    for accumulation in (1, 4):
        recipe = lf.Recipe(batch_size=8, accumulation_steps=accumulation, tune_epochs=1, tune_lr=1e-1)
        how = {"output_dir": tmp_path / str(accumulation), "heads": [(0, 1), (2, 2)], "progress": False}
        result = lf.fit(counting(kind), tiny_tokenizer(), example, recipe, engine=lf.Engine(compile=False), **how)
        found.append((result.history[0]["loss"], vectors(result.handle)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_what_a_model_divides_its_loss_by():
    assert divides_by_count(tiny_model("llama"))
    assert not divides_by_count(counting("own mean"))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trainer_adds_the_l1_term_once_per_step(tmp_path, accumulation):
    # one step of plain descent shows the gradient itself; AdamW would hide its size
    handle = scaled()
    before, parameters = vectors(handle), list(handle.parameters())
    loss = handle.model(**COLLATE(rows(8)), use_cache=False).loss
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    descent = torch.optim.SGD(parameters, lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(descent, lambda _: 1.0)
    trainer = trainer_on(
        handle,
        tmp_path,
        l1=L1,
        optimizers=(descent, constant),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    trainer.train()
    expected = gradient + L1 * before.sign()
    assert (before - vectors(handle) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_trainer_reports_an_epoch(tmp_path):
    handle, history = scaled(), []
    with torch.no_grad():
        loss = handle.model(**COLLATE(rows(8))).loss.item()
    trainer_on(
        handle, tmp_path, l1=L1, history=history, evaluation=rows(4), eval_strategy="epoch", num_train_epochs=2
    ).train()
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(row.keys() == {"epoch", "loss", "l1", "seconds", "step_losses", "eval_loss"} for row in history)
    # the loss of the one step of epoch 1 is that of the vectors it began with, and holds no L1 term
    assert history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert history[1]["l1"] == pytest.approx(L1 * vectors(handle).abs().sum().item(), rel=1e-6)
    with torch.no_grad():
        expected = handle.model.eval()(**COLLATE(rows(4))).loss.item()
    assert history[1]["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_trainer_without_evaluation_reports_no_eval_loss(tmp_path):
    history = []
    trainer_on(scaled(), tmp_path, history=history).train()
    assert [row.keys() for row in history] == [{"epoch", "loss", "l1", "seconds", "step_losses"}]
    assert history[0]["l1"] == 0


def test_trainer_evaluates_without_the_l1_term(tmp_path):
    handle = scaled()
    loss = trainer_on(handle, tmp_path, l1=1e3, evaluation=rows(8)).evaluate()["eval_loss"]
    with torch.no_grad():
        expected = handle.model.eval()(**COLLATE(rows(8))).loss.item()
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_evaluation_loss_is_the_mean_over_labels_whatever_the_batches(tmp_path, batch_size):
    handle = scaled()
    loss = trainer_on(handle, tmp_path, evaluation=rows(8), per_device_eval_batch_size=batch_size).evaluate()
    with torch.no_grad():
        expected = handle.model.eval()(**COLLATE(rows(8))).loss.item()
    assert loss["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_trainer_checkpoints_are_adapters(tmp_path):
    handle = scaled()
    trainer_on(handle, tmp_path, save_strategy="epoch").train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    } <= names
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}
    # fp32 moments included, everything together is a fraction of the base's bytes
    base = sum(p.numel() * 4 for p in handle.model.parameters())
    assert (
        sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt")) < base / 2
    )
    saved = read_adapter(checkpoint)
    for number, layer in handle.layers.items():
        assert saved.tensors["scale", number].equal(layer.scale.detach())


@pytest.mark.parametrize("where", ["cpu step", "epoch"])
def test_trainer_raises_on_a_loss_that_is_not_finite(tmp_path, monkeypatch, where):
    handle, history = scaled(), []
    base = {name: value.clone() for name, value in handle.model.state_dict().items()}
    if where == "epoch":
        # what is left of the checks on a device where reading every step's loss would wait for it
        monkeypatch.setattr("lofit_fast.training.trainer.runs_ahead", lambda device: True)
    with torch.no_grad():
        handle.layers[1].scale[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan in step 1 on examples .*lower learning rate"):
        trainer_on(handle, tmp_path, count=24, history=history, save_strategy="epoch").train()
    assert history == []
    assert not list(tmp_path.glob("checkpoint-*"))
    assert all(value.equal(base[name]) for name, value in handle.model.state_dict().items())


class Watch(TrainerCallback):
    """Learning rate and gradient norm of every optimizer step, after clipping."""

    def __init__(self):
        self.rates, self.norms = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        self.norms.append(torch.cat([g.flatten() for g in trained]).norm().item())


@pytest.fixture
def watched(monkeypatch):
    """(trainer, watch) of every step that fit trains."""
    seen = []

    class Watched(LofitTrainer):
        def __init__(self, handle, **options):
            watch = Watch()
            super().__init__(handle, **{**options, "callbacks": [watch]})
            seen.append((self, watch))

    monkeypatch.setattr(objectives, "LofitTrainer", Watched)
    return seen


def test_trainer_settings_of_fit(tmp_path, watched):
    examples = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghijklmnopqrst"]
    recipe = lf.Recipe(select_lr=3e-3, tune_lr=2e-2, select_epochs=3, tune_epochs=2, top=2, l1=100.0, init_std=0.1)
    lf.fit(tiny_model("llama"), tiny_tokenizer(), examples, recipe, output_dir=tmp_path, progress=False)
    expected = [(3e-3, 3, 100.0), (2e-2, 2, 0.0)]
    for (trainer, watch), (rate, epochs, l1) in zip(watched, expected, strict=True):
        (group,) = [group for group in trainer.optimizer.param_groups if group["params"]]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.AdamW)
        assert trainer.l1 == l1
        steps = 3 * epochs
        assert watch.rates == pytest.approx([rate * (steps - i) / steps for i in range(steps)])
        assert len(watch.norms) == steps
        assert max(watch.norms) <= 1 + 1e-5
    # the L1 term's gradient alone is far above 1 in every step of the first
    assert watched[0][1].norms == pytest.approx([1.0] * 9, abs=1e-5)


def test_trainer_clips_at_what_the_recipe_says(tmp_path, watched):
    examples = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefgh"]
    recipe = lf.Recipe(select_epochs=1, tune_epochs=1, top=2, l1=100.0, init_std=0.1, max_grad_norm=0.25)
    lf.fit(tiny_model("llama"), tiny_tokenizer(), examples, recipe, output_dir=tmp_path, progress=False)
    assert watched[0][1].norms == pytest.approx([0.25], abs=1e-5)


def test_l1_term_is_the_norm_of_all_scales():
    layers = {n: SimpleNamespace(scale=torch.randn(2, 4), offset=None) for n in range(3)}
    trainer = SimpleNamespace(handle=SimpleNamespace(layers=layers), l1=0.1, args=None)
    expected = 0.1 * sum(layer.scale.abs().sum() for layer in layers.values())
    torch.testing.assert_close(AttachmentTraining.l1_term(trainer), expected)
