"""Training of vectors that act on answers alone: every engine against a masked hook in a plain loop."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import IGNORED, encode
from lofit_fast.data.one_answer import check_one_answer
from lofit_fast.heads import jaccard
from lofit_fast.models.prompt_states import PROMPTS
from lofit_fast.tasks.task import Example, Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.encoded_preferences import draw_rejected
from lofit_fast.training.engine.attention_scope import attending
from lofit_fast.training.objectives import Preferences
from lofit_fast.training.prefix_cache.cache import STATES
from lofit_fast.training.stage import train_attachment
from lofit_fast.training.trainer import AttachmentTraining, Rows
from tests.library_versions import BY_ROW, called
from tests.masked_hook import MaskedHook
from tests.oracle import randomize, vectors_of
from tests.tiny_models import LAYERS, spread, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.dpo_by_hand import dpo_loss
from tests.training.tiny_runs import EXAMPLES as SHORT
from tests.training.tiny_runs import fit as quick_fit

PLACE = r"model\.layers\.N\.self_attn\.o_proj"
# a beginning that all share, so that packing has something to gain
EXAMPLES = [
    {"prompt": f"what is {a}+{b}=", "completion": (b + a) * n}
    for n in (1, 2)
    for a, b in zip("abcdef", "uvwxyz", strict=True)
]
RECIPE = lf.Recipe(top=4, select_epochs=2, tune_epochs=2, batch_size=4, l1=2e-3, init_std=1e-2, positions="answer")
# whole sequences go through the model
WHOLE = {"prompt_cache_gb": 0.0}
# name -> (engine, what batches of each step have of what is kept)
ENGINES = {
    "left to the rules": (lf.Engine(), [{PROMPTS}, {PROMPTS}]),
    "kept prompts": (lf.Engine(attention="sdpa", packing=False, prompt_cache_gb=0.01), [{PROMPTS}, {PROMPTS}]),
    "kept layers": (lf.Engine(attention="sdpa", packing=False, prefix_cache_gb=0.01, **WHOLE), [set(), {STATES}]),
    "padded": (lf.Engine(attention="sdpa", packing=False, narrow=False, **WHOLE), [set(), set()]),
    "one row": (lf.Engine(attention="sdpa", packing=True, **WHOLE), [set(), set()]),
    "shared beginnings": (lf.Engine(attention="lofit_grouped", packing=True, **WHOLE), [set(), set()]),
    "causal": (lf.Engine(attention="lofit_causal", packing=False, narrow=True, **WHOLE), [set(), set()]),
}
SLOW = ("kept prompts", "padded", "one row", "causal")


def hook_on(model, **heads):
    """A masked hook that starts from the very vectors that lofit_fast starts from."""
    handle = lf.patch(model, lf.LofitConfig(init_std=RECIPE.init_std, seed=RECIPE.seed, **heads))
    vectors = vectors_of(handle)
    handle.unpatch()
    model.requires_grad_(False)
    return MaskedHook(model, PLACE, vectors)


def plain_loop(model, hook, epochs, lr, l1=0.0):
    """AdamW, linear decay, clipping, whole padded batches. Returns the mean loss per epoch."""
    parameters = list(hook.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    steps, total, means = 0, sum(map(len, epochs)), []
    for batches in epochs:
        losses = []
        for batch in batches:
            optimizer.param_groups[0]["lr"] = lr * (total - steps) / total
            labels = batch["labels"]
            first = (labels != IGNORED).int().argmax(1)
            hook.mask = torch.arange(labels.shape[1]) >= first[:, None] - 1
            loss = model(**batch, use_cache=False).loss
            losses.append(loss.item())
            scales = [p for (_, component), p in hook.parameters.items() if component == "scale"]
            (loss + l1 * sum(scale.abs().sum() for scale in scales)).backward()
            nn.utils.clip_grad_norm_(parameters, RECIPE.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        means.append(sum(losses) / len(losses))
    return means


def recorded(monkeypatch):
    """Lists to which every batch of training is added: as whole padded sequences, and what of it was kept."""
    batches, kept, noted = [], [], AttachmentTraining.noted

    def recording(trainer, collate, number_of):
        def collated(rows):
            batch = collate(rows)
            batches.append(CompletionCollator(0, logits="all")(rows))
            kept.append({PROMPTS, STATES} & batch.keys())
            return batch

        return noted(trainer, collated, number_of)

    monkeypatch.setattr(AttachmentTraining, "noted", recording)
    return batches, kept


def losses_of(result, stage):
    return [row["loss"] for row in result.history if row["stage"] == stage]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in ENGINES])
def test_both_steps_are_those_of_a_masked_hook(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    family = "gemma3" if kind == "left to the rules" else "llama"
    model = spread(tiny_model(family))
    engine, expected = ENGINES[kind]
    recipe = RECIPE if kind != "kept layers" else replace(RECIPE, min_layer=1)
    batches, kept = recorded(monkeypatch)
    how = {"output_dir": tmp_path / "run", "progress": False, "engine": engine}
    result = lf.fit(model, tiny_tokenizer(), EXAMPLES, recipe, **how)
    assert result.handle.config.positions == "answer"
    tuned = vectors_of(result.handle)
    result.handle.unpatch()
    epochs = [batches[i : i + 3] for i in range(0, len(batches), 3)]
    assert len(epochs) == 4 and kept == [of for of in expected for _ in range(6)]

    model.train()
    hook = hook_on(model, scale="all")
    losses = plain_loop(model, hook, epochs[:2], RECIPE.select_lr, RECIPE.l1)
    hook.remove()
    scores = torch.stack([hook.parameters[n, "scale"].detach().norm(dim=1) for n in range(LAYERS)])
    assert losses_of(result, "select") == pytest.approx(losses, rel=1e-4)
    assert (scores - result.scores).abs().max() <= 1e-3 * scores.max()
    heads = lf.select_heads(scores, RECIPE.top, recipe.min_layer)
    assert jaccard(heads, result.heads) == 1

    hook = hook_on(model, offset=heads)
    losses = plain_loop(model, hook, epochs[2:], RECIPE.tune_lr)
    hook.remove()
    assert losses_of(result, "tune") == pytest.approx(losses, rel=1e-4)
    for key, (_, rows) in tuned.items():
        assert (rows - hook.parameters[key].detach()).abs().max() <= 1e-3 * rows.abs().max()


# every graph takes seconds to trace; tests/patching/test_answer_layer.py compiles a projection in the ordinary run
@pytest.mark.slow
def test_compiled_layers(tmp_path, quick_compiler):
    recipe = lf.Recipe(top=3, select_epochs=1, tune_epochs=1, batch_size=6, positions="answer")
    how = {"heads": [(0, 1), (2, 3)]}
    plain = quick_fit(tiny_model("llama"), tmp_path / "a", recipe, engine=lf.Engine(compile=False), **how)
    compiled = quick_fit(tiny_model("llama"), tmp_path / "b", recipe, engine=lf.Engine(compile=True), **how)
    assert compiled.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-5)


PREFERENCES = [Preference(f"Q: {name}? A:", f" {name}.", (f" {name[::-1]}x!",)) for name in ("ab", "cde", "f", "ghij")]


def test_preferences_are_dpo_of_a_masked_hook(tmp_path):
    pytest.importorskip("trl")
    tokenizer, beta, lr, epochs = tiny_tokenizer(), 0.5, 3e-2, 2
    model, plain = spread(tiny_model("llama")), spread(tiny_model("llama"))
    handle = lf.patch(model, lf.LofitConfig(scale=[(0, 1)], offset="all", positions="answer"))
    randomize(handle)
    hook = MaskedHook(plain, PLACE, vectors_of(handle))
    schedule = Schedule(lr=lr, epochs=epochs, batch_size=len(PREFERENCES), seed=7, max_grad_norm=float("inf"))
    how = {"output_dir": tmp_path, "progress": False}
    got = train_attachment(handle, tokenizer, Preferences(PREFERENCES, beta), schedule, **how)["loss"]

    def log_p(model, preference, answer):
        row = encode(tokenizer, Example(preference.prompt, answer), None)
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        hook.mask = torch.arange(len(ids))[None] >= row["labels"].count(IGNORED) - 1
        rows = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        return rows.gather(1, ids[1:, None])[:, 0][labels[1:] != IGNORED].sum()

    reference = spread(tiny_model("llama"))
    parameters = list(hook.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for epoch, draws in enumerate(draw_rejected(PREFERENCES, epochs, 7)):
        optimizer.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        loss = dpo_loss(PREFERENCES, draws, beta, partial(log_p, plain), partial(log_p, reference))
        assert got[epoch] == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_run_goes_on_with_the_positions_that_it_began_with(tmp_path):
    answers = lf.Recipe(top=2, select_epochs=1, tune_epochs=1, positions="answer")
    everywhere = lf.Recipe(top=2, select_epochs=1, tune_epochs=1)
    quick_fit(tiny_model("llama"), tmp_path, answers)
    result = quick_fit(tiny_model("llama"), tmp_path, answers)
    assert result.handle.config.positions == "answer"
    with pytest.raises(ValueError, match="another recipe"):
        quick_fit(tiny_model("llama"), tmp_path, everywhere)
    # runs of earlier releases say nothing of positions
    quick_fit(tiny_model("llama"), tmp_path / "all", everywhere)
    assert "positions" not in json.loads((tmp_path / "all" / "state.json").read_text())["identity"]["recipe"]
    assert "positions" not in everywhere.of_step1()
    assert answers.of_step1()["positions"] == "answer"
    with pytest.raises(ValueError, match="another recipe"):
        quick_fit(tiny_model("llama"), tmp_path / "all", answers)


def test_a_conversation_of_several_answers_is_refused():
    one = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    check_one_answer([one, {"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}])
    two = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}
    with pytest.raises(ValueError, match="example 2 has 2 answers, expected 1"):
        check_one_answer([one, two])


def test_so_is_one_that_is_evaluated(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    how = {"eval_data": [{"messages": turns}], "output_dir": tmp_path / "run", "heads": [(0, 1)], "progress": False}
    examples, recipe = [{"messages": turns[:2]}], lf.Recipe(positions="answer")
    with pytest.raises(ValueError, match="evaluation example 1 has 2 answers, expected 1"):
        lf.fit(tiny_model("llama"), tiny_tokenizer(chat=True), examples, recipe, **how)


def test_stock_trainer_and_its_evaluation():
    from transformers import Trainer, TrainingArguments

    tokenizer = tiny_tokenizer()
    rows = [encode(tokenizer, example, None) for example in SHORT]
    model, plain = tiny_model("llama"), tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    randomize(handle)
    hook = MaskedHook(plain, PLACE, vectors_of(handle))
    trainer = Trainer(
        model,
        TrainingArguments("unused", report_to=[], prediction_loss_only=True, per_device_eval_batch_size=len(rows)),
        data_collator=CompletionCollator(0, logits="all"),
        eval_dataset=Rows(rows),
    )
    batch = CompletionCollator(0, logits="all")(rows)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    hook.mask = torch.arange(batch["labels"].shape[1]) >= first[:, None] - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain(**batch).loss.item(), rel=1e-5)


def test_attention_made_for_cpus_takes_masks_of_shared_beginnings():
    from lofit_fast.data.pack import PackedCollator

    tokenizer = tiny_tokenizer()
    rows = [encode(tokenizer, example, None) for example in EXAMPLES]
    model, plain = tiny_model("qwen3", torch.float64), tiny_model("qwen3", torch.float64)
    handle = lf.patch(model, lf.LofitConfig(scale=[(1, 2)], offset="all", positions="answer"))
    randomize(handle)
    hook = MaskedHook(plain, PLACE, vectors_of(handle))
    batch = PackedCollator(0, logits=BY_ROW)(rows)
    assert batch["input_ids"].shape[1] < sum(len(row["input_ids"]) for row in rows) / 1.5
    with attending(model, "lofit_grouped"):
        got = called(model, batch).logits.flatten(0, -2)
    found = []
    for row in rows:
        cut = row["labels"].count(IGNORED)
        hook.mask = torch.arange(len(row["input_ids"]))[None] >= cut - 1
        found.append(plain(torch.tensor([row["input_ids"]])).logits[0, cut - 1 : -1])
    assert torch.allclose(got, torch.cat(found), atol=1e-10)
