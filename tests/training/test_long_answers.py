"""Losses from chunks of logits in whole trainings: completions, preferences, references, and saliency's gradients."""

import pytest
import torch
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.data.encode import encode_all
from lofit_fast.evaluation.logprobs import log_probs
from lofit_fast.models import head_trial, linear_loss
from lofit_fast.tasks.task import Example, Preference
from lofit_fast.training import objectives
from lofit_fast.training.engine import Engine
from lofit_fast.training.first_epoch import first_epoch, loss_sum
from lofit_fast.training.fit import fit_preferences
from tests.tiny_models import VOCAB, spread, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, HELD_OUT, QUICK

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def chunks(monkeypatch):
    """Switches chunks of 5 rows on, and lists how many rows went through them."""
    seen = []

    def on():
        for module in (linear_loss, head_trial):
            monkeypatch.setattr(module, "LONG", 0)
        monkeypatch.setattr(linear_loss, "CHUNK", 5 * VOCAB * 4)
        chunk = linear_loss._chunk

        def counted(hidden, *rest):
            seen.append(len(hidden))
            return chunk(hidden, *rest)

        monkeypatch.setattr(linear_loss, "_chunk", counted)
        return seen

    return on


def losses(result, *names):
    return [row[name] for row in result.history for name in names]


def vectors(result):
    found = torch.cat([parameter.detach().flatten() for parameter in result.handle.parameters()])
    result.handle.unpatch()
    return found


@pytest.mark.parametrize(
    "engine",
    [Engine(), pytest.param(Engine(packing=False, narrow=False), marks=pytest.mark.slow)],
    ids=["packed", "padded"],
)
def test_fit_on_long_answers(tmp_path, chunks, engine, monkeypatch):
    model = spread(tiny_model("gemma2"))
    how = {"eval_data": HELD_OUT, "engine": engine, "progress": False}
    plain = lf.fit(model, TOKENIZER, EXAMPLES, QUICK, output_dir=tmp_path / "plain", **how)
    expected = vectors(plain)
    seen, asked, collator = chunks(), [], objectives.collator_of
    monkeypatch.setattr(objectives, "collator_of", lambda *given: asked.append(given[2]) or collator(*given))
    ours = lf.fit(model, TOKENIZER, EXAMPLES, QUICK, output_dir=tmp_path / "ours", **how)
    assert 0 < max(seen) <= 5
    # the model was tried before its head gave empty logits
    assert set(asked) == {"index"}
    assert ours.heads == plain.heads
    assert losses(ours, "loss", "eval_loss") == pytest.approx(losses(plain, "loss", "eval_loss"), rel=1e-5)
    assert (vectors(ours) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_accumulated_micro_batches_of_long_answers(tmp_path, chunks):
    recipe = lf.Recipe(**{**vars(QUICK), "batch_size": 4, "accumulation_steps": 2})
    model = spread(tiny_model("llama"))
    plain = lf.fit(model, TOKENIZER, EXAMPLES, recipe, output_dir=tmp_path / "plain", progress=False)
    plain.handle.unpatch()
    assert chunks() == []
    ours = lf.fit(model, TOKENIZER, EXAMPLES, recipe, output_dir=tmp_path / "ours", progress=False)
    assert losses(ours, "loss") == pytest.approx(losses(plain, "loss"), rel=1e-5)


def test_saliency_of_long_answers(chunks):
    model, recipe = spread(tiny_model("qwen3")), lf.Recipe(batch_size=4)
    rows = encode_all(TOKENIZER, [Example(e["prompt"], e["completion"]) for e in EXAMPLES], None)
    handle = lf.patch(model, lf.LofitConfig(scale="all"))

    def gradients():
        batches = first_epoch(model, TOKENIZER, rows, recipe, Engine(), False)
        total = sum(loss_sum(model, batch) for batch, _ in batches)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(handle.parameters()))])

    plain, seen = gradients(), chunks()
    assert (gradients() - plain).norm() <= 1e-5 * plain.norm()
    assert seen


def test_references_of_long_answers(chunks):
    model = spread(tiny_model("gemma2")).requires_grad_(False)
    rows = encode_all(TOKENIZER, [Example(e["prompt"], e["completion"]) for e in EXAMPLES], None)
    plain, seen = log_probs(model, rows, 0, batch_size=4), chunks()
    assert log_probs(model, rows, 0, batch_size=4) == pytest.approx(plain, rel=1e-6)
    assert seen


PAIRS = [
    Preference(f"Q: {name}? A:", f" {name}.", tuple(f" {wrong}!" for wrong in "xyz"[: 1 + number % 3]))
    for number, name in enumerate(("ab", "cde", "f", "ghij", "kl", "m"))
]


def test_preferences_of_long_answers(tmp_path, chunks):
    pytest.importorskip("trl")

    logged = []

    class Logged(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append({key: value for key, value in logs.items() if "time" not in key and "second" not in key})

    recipe = lf.Recipe(top=4, select_epochs=1, tune_epochs=2, batch_size=4)
    model = spread(tiny_model("gemma2"))
    how = {"progress": False, "callbacks": [Logged()]}
    plain = fit_preferences(model, TOKENIZER, PAIRS, recipe, output_dir=tmp_path / "plain", **how)
    expected, seen, half = vectors(plain), chunks(), len(logged)
    ours = fit_preferences(model, TOKENIZER, PAIRS, recipe, output_dir=tmp_path / "ours", **how)
    assert seen and max(seen) <= 5
    assert losses(ours, "loss") == pytest.approx(losses(plain, "loss"), rel=1e-5)
    assert (vectors(ours) - expected).abs().max() <= 1e-4 * expected.abs().max()
    # what TRL logs of the rows too
    for got, wanted in zip(logged[half:], logged[:half], strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)
