"""DPO through TRL against its equation, step by step, and what is left behind."""

import contextlib
import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.data.encode import IGNORED, encode
from lofit_fast.models.logit_rows import logit_rows
from lofit_fast.tasks.task import Example, Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.encoded_preferences import draw_rejected
from lofit_fast.training.fit import fit_preferences
from lofit_fast.training.objectives import Preferences
from lofit_fast.training.profiling import ProfileSteps
from lofit_fast.training.stage import train_attachment
from tests.oracle import randomize
from tests.tiny_families import tiny_family
from tests.tiny_models import spread, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.dpo_by_hand import dpo_loss

pytest.importorskip("trl")

TOKENIZER = tiny_tokenizer()
PREFERENCES = [
    Preference(f"Q: {name}? A:", f" {name}.", tuple(f" {wrong}!" for wrong in "xyz"[: 1 + number % 3]))
    for number, name in enumerate(("ab", "cde", "f", "ghij", "kl", "m"))
]
SAME = Preference("Q: ", "No.", ("x", "No.</s>"))


def train_dpo(attachment, folder, preferences=PREFERENCES, tokenizer=TOKENIZER, beta=0.5, **changes):
    schedule = Schedule(**{"epochs": 1, **changes})
    how = {"output_dir": folder, "progress": False}
    return train_attachment(attachment, tokenizer, Preferences(preferences, beta), schedule, **how)


def log_p(model, preference, answer):
    row = encode(TOKENIZER, Example(preference.prompt, answer), None)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    rows = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, ids[1:, None])[:, 0][labels[1:] != IGNORED].sum()


def by_hand(model, handle, reference, lr, epochs, beta, l1):
    """One step an epoch over all questions. Returns the losses."""
    optimizer = torch.optim.AdamW(handle.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for epoch, draws in enumerate(draw_rejected(PREFERENCES, epochs, 7)):
        optimizer.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        loss = dpo_loss(PREFERENCES, draws, beta, partial(log_p, model), partial(log_p, reference))
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + l1 * sum(layer.scale.abs().sum() for layer in handle.layers.values())).backward()
        nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
    return losses


def test_train_dpo_follows_the_equation(tmp_path, monkeypatch):
    import trl.trainer.dpo_trainer as theirs

    # neither a second model nor a report to anyone
    monkeypatch.setattr(theirs, "create_model_from_path", None)
    monkeypatch.setattr("trl.trainer.base_trainer._BaseTrainer._send_telemetry", None)
    ours, hand, base = (spread(tiny_model("llama", dtype=torch.float64)) for _ in range(3))
    handles = [lf.patch(model, lf.LofitConfig(scale="all", seed=3)) for model in (ours, hand)]
    for handle in handles:
        randomize(handle, std=0.3)
    options = {"lr": 2e-2, "epochs": 3, "beta": 0.7, "l1": 1e-2}
    losses = by_hand(hand, handles[1], base, **options)
    done = train_dpo(handles[0], tmp_path, batch_size=6, seed=7, **options)
    assert done["loss"] == pytest.approx(losses, abs=1e-6)
    assert done["seconds"] > 0
    assert losses[0] != pytest.approx(0.6931, abs=1e-2)
    for mine, theirs_ in zip(*(handle.parameters() for handle in handles), strict=True):
        assert (mine - theirs_).abs().max() <= 1e-5


class Shift(nn.Module):
    """An attachment that is not ours: adds a vector to what a module puts out."""

    def __init__(self, model):
        super().__init__()
        object.__setattr__(self, "model", model.requires_grad_(False))
        self.vector, self.on = nn.Parameter(torch.full((32,), 0.5)), True
        model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + self.vector if self.on else out)
        model.model.layers[1].shift = self

    @contextlib.contextmanager
    def disabled(self):
        self.on = False
        yield
        self.on = True

    def penalty(self):
        return 100.0 * self.vector.square().sum()


def test_train_dpo_of_any_attachment(tmp_path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shift = Shift(model)
    done = train_dpo(shift, tmp_path, lr=1e-2, epochs=2, batch_size=4)
    assert len(done["loss"]) == 2
    # the penalty pulls all of it towards zero
    assert (shift.vector < 0.5).all()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    # trainers would never see it
    del model.model.layers[1].shift
    with pytest.raises(ValueError, match="parameters in its model"):
        train_dpo(shift, tmp_path, lr=1e-2)


def test_train_dpo_leaves_the_model_as_it_was(tmp_path):
    model, tokenizer = tiny_model("gemma2").train(), tiny_tokenizer()
    tokenizer.pad_token = None
    model.config.pad_token_id, model.config.use_cache = None, True
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    seen = (set(vars(model)), model.generation_config.pad_token_id, getattr(model, "model_tags", None))
    train_dpo(handle, tmp_path, PREFERENCES[:2], tokenizer, lr=1e-2)
    # every Trainer leaves the one, and a tag that is None is as good as none
    assert set(vars(model)) - seen[0] <= {"_is_accelerate_prepared", "model_tags"}
    assert (model.generation_config.pad_token_id, getattr(model, "model_tags", None)) == seen[1:]
    assert (model.config.pad_token_id, model.config.use_cache, tokenizer.pad_token) == (None, True, None)
    assert all(module.training for module in model.modules())


def test_labelled_only_answers_as_trl_does():
    from trl.trainer.utils import add_fused_lm_head

    from lofit_fast.training.preference_trainer import labelled_only

    # with a soft cap on its logits
    model = tiny_model("gemma2", seed=5)
    ours = labelled_only(model.forward)
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=names)
    ids = torch.randint(3, 97, (3, 9))
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(3, 9) < 0.6, IGNORED), "use_cache": False}
    with torch.no_grad():
        mine, theirs = ours(**given, fused_lm_head=True), model(**given, fused_lm_head=True)
    for name in names:
        assert (mine[name].float() - theirs[name].float()).abs().max() <= 2e-5, name
    assert mine.log_probs.abs().sum() > 1


class Halved(LlamaForCausalLM):
    """Does something to its logits of which no config tells."""

    def forward(self, *given, **more):
        out = super().forward(*given, **more)
        out.logits = out.logits / 2
        return out


def test_a_head_that_trl_does_not_know_is_found():
    from trl.trainer.utils import add_fused_lm_head

    from lofit_fast.training.preference_trainer import labelled_only, trl_agrees

    for family, kind, expected in (("gemma2", None, True), ("llama", None, True), ("llama", Halved, False)):
        model = tiny_model(family)
        model.__class__ = kind or type(model)
        randomize(lf.patch(model, lf.LofitConfig(offset="all", positions="answer")), 0.1)
        ours = labelled_only(model.forward, logit_rows(model))
        add_fused_lm_head(model)
        theirs = model.forward
        assert trl_agrees(model, ours) is expected
        assert model.forward == theirs


def test_labelled_only_passes_on_what_routers_lose():
    from lofit_fast.training.preference_trainer import labelled_only

    model = tiny_family("mixtral")
    ids = torch.randint(3, 97, (2, 9))
    given = {"input_ids": ids, "labels": ids, "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        got, expected = labelled_only(model.forward)(**given, fused_lm_head=True), model(**given)
    assert expected.aux_loss > 0
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)


def test_draw_rejected():
    draws = draw_rejected(PREFERENCES, 40, 1)
    assert draws[:3] == draw_rejected(PREFERENCES, 3, 1) != draw_rejected(PREFERENCES, 3, 2)
    for number, preference in enumerate(PREFERENCES):
        assert {epoch[number] for epoch in draws} == set(range(len(preference.rejected)))


RECIPE = lf.Recipe(select_lr=5e-2, tune_lr=5e-2, select_epochs=1, tune_epochs=3, top=4, batch_size=3)


def test_fit_preferences_writes_a_run(tmp_path, monkeypatch):
    model = tiny_model("llama")
    traced = {"callbacks": [ProfileSteps(tmp_path, warmup=0, steps=1)], "progress": False}
    result = fit_preferences(model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, **traced)
    assert {"select.md", "tune.md"} <= {path.name for path in (tmp_path / "profile").iterdir()}
    assert lf.handle_of(model) is result.handle
    assert (len(result.heads), result.scores.shape) == (4, (3, 4))
    assert [(row["stage"], row["epoch"]) for row in result.history] == [
        ("select", 1),
        *(("tune", i) for i in (1, 2, 3)),
    ]
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert result.metrics["tune"].keys() == {"seconds", "tokens_per_s", "examples_per_s", "peak_memory_bytes"}
    # an epoch goes over each question's chosen answer and one that is rejected, here all as long
    answers = [(p.prompt, answer) for p in PREFERENCES for answer in (p.chosen, p.rejected[0])]
    tokens = sum(len(encode(TOKENIZER, Example(*pair), None)["input_ids"]) for pair in answers)
    for row in result.history:
        assert row["examples_per_s"] * row["seconds"] == pytest.approx(len(PREFERENCES))
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(tokens)
    assert json.loads((tmp_path / "state.json").read_text())["stage"] == "done"
    margins = []
    for scope in (contextlib.nullcontext(), result.handle.disabled()):
        with scope, torch.no_grad():
            margins.append([log_p(model, p, p.chosen) - log_p(model, p, p.rejected[0]) for p in PREFERENCES])
    assert sum(margins[0]) > sum(margins[1])
    # a finished run is only loaded
    monkeypatch.setattr("lofit_fast.training.two_steps.train", None)
    tuned = [parameter.clone() for parameter in result.handle.parameters()]
    result.handle.unpatch()
    again = fit_preferences(model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.handle.parameters(), tuned, strict=True))
    again.handle.unpatch()
    with pytest.raises(ValueError, match="another beta"):
        fit_preferences(model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, beta=0.1)


def test_fit_preferences_of_given_heads(tmp_path):
    model = tiny_model("llama")
    result = fit_preferences(
        model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, heads=[(1, 2), (0, 0)], progress=False
    )
    assert (result.heads, result.scores, set(result.handle.layers)) == ([(1, 2), (0, 0)], None, {0, 1})


def test_dpo_errors(tmp_path, monkeypatch):
    model = tiny_model("llama")

    def fit(preferences=PREFERENCES, heads=None, **changes):
        recipe = lf.Recipe(**{"batch_size": 2, **changes})
        fit_preferences(model, TOKENIZER, preferences, recipe, output_dir=tmp_path / "run", heads=heads)

    for wrong, message in (
        ({"top": 13}, "asked for the top 13 heads"),
        ({"heads": [(9, 0)]}, "heads the model does not have"),
        ({"accumulation_steps": 2}, "got accumulation_steps=2, expected 1"),
        ({"max_length": 9}, "the limit is 9"),
        ({"preferences": []}, "at least one preference"),
        # as texts they differ
        ({"preferences": [*PREFERENCES, SAME]}, "preference 7: chosen and rejected have the same tokens"),
        ({"select_epochs": 0}, "at least 1 epoch in each step"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(**wrong)
        assert lf.handle_of(model) is None
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "lofit_fast.training.preference_trainer", raising=False)
    monkeypatch.delattr("lofit_fast.training.preference_trainer", raising=False)
    with pytest.raises(ImportError, match=r'pip install "lofit-fast\[preferences\]"'):
        fit()


@pytest.mark.parametrize("unused", [{"packing": True}, {"narrow": True}])
def test_dpo_refuses_what_it_cannot_use(tmp_path, unused):
    model = tiny_model("llama")
    [(name, value)] = unused.items()
    with pytest.raises(ValueError, match=f"{name}={value} was asked for, but training on preferences"):
        fit_preferences(model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, engine=lf.Engine(**unused))
    assert lf.handle_of(model) is None and not list(tmp_path.iterdir())


def test_dpo_uses_the_rest_of_the_engine(tmp_path):
    model, seen = tiny_model("llama"), set()
    model.register_forward_pre_hook(lambda m, _: seen.add(m.config._attn_implementation))
    engine = lf.Engine(attention="eager", compile=False, group_by_length=False)
    fit_preferences(model, TOKENIZER, PREFERENCES, RECIPE, output_dir=tmp_path, engine=engine, progress=False)
    assert "eager" in seen
    kept = json.loads((tmp_path / "state.json").read_text())
    assert kept["engine"]["tune"]["attention"] == "eager"
    assert kept["identity"]["group_by_length"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dpo_compares_like_with_like(tmp_path, dtype):
    # a reference that another kernel rounds otherwise would be a difference before anything is learned
    model, recipe = spread(tiny_model("llama", dtype)), lf.Recipe(init_std=0.0, select_epochs=1, tune_epochs=1, top=4)
    result = fit_preferences(model, TOKENIZER, PREFERENCES, recipe, output_dir=tmp_path, progress=False)
    assert json.loads((tmp_path / "state.json").read_text())["engine"]["select"]["attention"] == "sdpa"
    assert result.history[0]["step_losses"][0] == pytest.approx(0.69315, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_dpo_of_experts_has_no_penalty_on_their_routers(tmp_path, family):
    # TRL would add the config's, of routers that are frozen
    model, recipe = tiny_family(family), lf.Recipe(init_std=0.0, select_epochs=1, tune_epochs=1, top=4)
    model.config.router_aux_loss_coef = 1.0
    result = fit_preferences(model, TOKENIZER, PREFERENCES, recipe, output_dir=tmp_path, progress=False)
    assert result.history[0]["step_losses"][0] == pytest.approx(0.69315, abs=1e-5)
