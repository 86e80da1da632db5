"""Every way to choose heads: what it returns, what it leaves, and that it finds what is there to be found."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.cli.select_command import METHODS
from lofit_fast.data.encode import IGNORED, encode
from lofit_fast.heads import select_heads
from lofit_fast.selection.methods import SELECTORS
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.task import Example, Preference, Task
from lofit_fast.training.objectives import BETA, objective_of
from tests.ordinary_sample import some_now
from tests.tiny_models import HEADS, LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

PAIRS = list(zip("abcdefghijkl", "mnopqrstuvwx", strict=True))
EXAMPLES = [Example(f"{a}+{b}=", b + a) for a, b in PAIRS]
COMPLETIONS = Task("completions", EXAMPLES, [])
PREFERENCES = Task(
    "preferences", [], [], preferences=tuple(Preference(f"{a}+{b}=", b + a, (a, a + b + "q")) for a, b in PAIRS)
)
RECIPE = lf.Recipe(top=3, batch_size=3, select_epochs=2)
TRAINED = ("lofit", "bias_norm", "early_stop")


def select(name, folder, task=COMPLETIONS, recipe=RECIPE, model=None, **options):
    return SELECTORS[name](model or tiny_model("llama"), tiny_tokenizer(), task, recipe, output_dir=folder, **options)


def test_the_command_line_offers_all_there_are():
    assert tuple(SELECTORS) == METHODS


@pytest.mark.parametrize("name", SELECTORS)
def test_selects_and_leaves_the_model_alone(name, tmp_path):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    found = select(name, tmp_path, model=model)
    assert found.scores.shape == (LAYERS, HEADS)
    assert found.heads == select_heads(found.scores, 3)
    assert found.seconds > 0
    assert lf.handle_of(model) is None
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not model.training
    # and the same again
    assert select(name, tmp_path / "again").heads == found.heads


@pytest.mark.parametrize("name", SELECTORS)
def test_seed_and_lowest_layer_are_heard(name, tmp_path):
    recipe = lf.Recipe(top=4, min_layer=1, batch_size=3, select_epochs=1)
    one, two = (select(name, tmp_path / str(seed), recipe=recipe, seed=seed) for seed in (1, 2))
    assert all(layer >= 1 for layer, _ in one.heads)
    assert not one.scores.equal(two.scores)


def test_methods_differ(tmp_path):
    scores = [select(name, tmp_path / name).scores for name in ("lofit", "bias_norm", "saliency", "random")]
    assert not any(a.allclose(b) for i, a in enumerate(scores) for b in scores[:i])


def test_lofit_goes_on_from_its_folder(tmp_path):
    first = select("lofit", tmp_path)
    again = select("lofit", tmp_path)
    assert (again.heads, again.seconds) == (first.heads, first.seconds)


def planted(told_by):
    """A Llama that knows the task in one place only: all other heads are cut off from the stream."""
    model = tiny_model("llama")
    for layer, block in enumerate(model.model.layers):
        for head in range(HEADS):
            if (layer, head) != told_by:
                block.self_attn.o_proj.weight.data[:, 16 * head : 16 * (head + 1)] *= 1e-3
    return model


@pytest.mark.parametrize("name", ["lofit", "early_stop", "saliency"])
def test_finds_the_one_head_that_has_any_say(name, tmp_path):
    recipe = lf.Recipe(top=1, batch_size=3, select_epochs=2, l1=5e-3, select_lr=5e-4, init_std=0.0)
    assert select(name, tmp_path, model=planted((1, 2)), recipe=recipe).heads == [(1, 2)]


def on_gradients(model, seen):
    """Calls `seen` with the tokens of every forward that builds a graph: what a model can do is tried without."""

    def look(module, args, options):
        if torch.is_grad_enabled():
            seen(options["input_ids"])

    model.register_forward_pre_hook(look, with_kwargs=True)


def test_saliency_passes_over_everything_once(tmp_path):
    model, tokens = tiny_model("llama"), []
    on_gradients(model, lambda ids: tokens.append(ids.numel()))
    select("saliency", tmp_path, model=model)
    assert sum(tokens) == sum(len(encode(tiny_tokenizer(), e, None)["input_ids"]) for e in EXAMPLES)
    assert len(tokens) == 4


def test_saliency_in_micro_batches(tmp_path):
    # a last step of two micro-batches, the second of them short
    examples = [Example(f"{a}+{b}=", b + a * (1 + i % 4)) for i, (a, b) in enumerate(PAIRS[:11])]
    task, recipe = Task("completions", examples, []), lf.Recipe(top=3, batch_size=6, accumulation_steps=2)
    passes = []
    model = tiny_model("llama")
    on_gradients(model, passes.append)
    found = select("saliency", tmp_path, task, recipe, model)
    assert len(passes) == 4
    # how a step is cut is no business of its gradient
    whole = select("saliency", tmp_path, task, lf.Recipe(top=3, batch_size=6))
    torch.testing.assert_close(found.scores, whole.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", some_now(TRAINED, "bias_norm"))
def test_preferences_through_trl(name, tmp_path):
    pytest.importorskip("trl")
    model = tiny_model("llama")
    recipe = lf.Recipe(top=12, batch_size=3, select_epochs=4)
    found = select(name, tmp_path, PREFERENCES, recipe=recipe, model=model)
    assert found.scores.min() > 0
    assert lf.handle_of(model) is None
    # with every head among the top heads the third look, after 6 of 16 steps, is the last
    whole = select("lofit", tmp_path / "whole", PREFERENCES, recipe=recipe, model=model)
    assert found.scores.allclose(whole.scores) == (name == "lofit")


def log_p(model, prompt, answer):
    row = encode(tiny_tokenizer(), Example(prompt, answer), None)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
    logs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(1)
    return logs[labels != IGNORED, labels[labels != IGNORED]].sum()


def test_preferences_push_as_dpo_does_at_its_start(tmp_path):
    pytest.importorskip("trl")
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(scale="all", init_std=0.0))
    recipe = lf.Recipe(top=3, batch_size=len(PAIRS))
    (loss,) = objective_of(PREFERENCES).encoded(model, tiny_tokenizer(), None).losses(None, recipe, lf.Engine(), False)
    got = torch.autograd.grad(loss, list(handle.parameters()))
    losses = []
    for c in contrasts(PREFERENCES, recipe.seed):
        right, wrong = log_p(model, c.prompt, c.right), log_p(model, c.prompt, c.wrong)
        losses.append(-torch.nn.functional.logsigmoid(BETA * ((right - right.detach()) - (wrong - wrong.detach()))))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(handle.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["saliency", "iti_probe", "probing_layers", "random"])
def test_preferences_without_training(name, tmp_path):
    if name == "saliency":
        pytest.importorskip("trl")
    assert len(select(name, tmp_path, PREFERENCES).heads) == 3


@pytest.mark.parametrize(
    "name, component, stops", [("lofit", "scale", 0), ("bias_norm", "offset", 0), ("early_stop", "scale", 1)]
)
def test_preferences_are_trained_with_dpo(name, component, stops, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    calls = []

    def train(handle, data, schedule, engine, *, on_epoch, callbacks, **how):
        calls.append((getattr(handle.config, component), data.preferences, schedule, callbacks))
        getattr(handle.layers[2], component).data[1] = 7.0
        return 1.5, None

    monkeypatch.setattr("lofit_fast.training.two_steps.train", train)
    model = tiny_model("llama")
    found = select(name, tmp_path, PREFERENCES, model=model, seed=5)
    assert (found.heads[0], found.seconds) == ((2, 1), 1.5)
    ((heads, preferences, schedule, callbacks),) = calls
    assert (heads, preferences) == ("all", PREFERENCES.preferences)
    expected = {"lr": RECIPE.select_lr, "epochs": 2, "l1": RECIPE.l1, "batch_size": 3, "seed": 5}
    assert expected.items() <= vars(schedule).items()
    assert len(callbacks) == stops
    assert lf.handle_of(model) is None
