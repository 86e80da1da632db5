"""Probes: the optimum of each of a batch, what they say of data that is easy or hopeless, and the outputs they read."""

import math

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.architectures import find_projections
from lofit_fast.selection.linear_probes import (
    fit_probes,
    head_activations,
    layer_probe_accuracy,
    probe_accuracy,
    split_of,
)
from lofit_fast.tasks.contrast import Contrast
from tests.tiny_models import HEADS, LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

CONTRASTS = [Contrast(f"{a}+b=", f" {a}", f" {b}{a}c") for a, b in zip("abcde", "vwxyz", strict=True)]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def objective(x, labels, weights, intercept, l2):
    """The definition, for one problem."""
    sign = labels.double() * 2 - 1
    return torch.nn.functional.softplus(-sign * (x @ weights + intercept)).sum() + l2 / 2 * weights.square().sum()


@pytest.mark.parametrize("rows, features", [(40, 5), (12, 30)])
@pytest.mark.parametrize("l2", [0.01, 1.0])
def test_every_probe_of_a_batch_is_at_its_own_optimum(rows, features, l2):
    x, labels = draw(7, rows, features) * torch.logspace(-1, 1, 7)[:, None, None], torch.arange(rows) % 3 > 0
    weights, intercepts = fit_probes(x, labels, l2)
    assert (weights.shape, intercepts.shape) == ((7, features), (7,))
    for p in range(7):
        at = [weights[p].clone().requires_grad_(), intercepts[p].clone().requires_grad_()]
        value = objective(x[p], labels, *at, l2)
        for gradient in torch.autograd.grad(value, at):
            assert gradient.abs().max() < 1e-6 * rows
        nearby = [a.detach() + 0.01 * torch.randn_like(a) for a in at]
        assert value < objective(x[p], labels, *nearby, l2)


def test_probes_agree_with_plain_gradient_descent():
    x, labels = draw(1, 30, 3), torch.arange(30) % 2 > 0
    w, c = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
    c.requires_grad_()
    for _ in range(2000):
        for at, gradient in zip((w, c), torch.autograd.grad(objective(x[0], labels, w, c, 1.0), (w, c)), strict=True):
            at.data -= 0.05 * gradient
    weights, intercepts = fit_probes(x, labels)
    torch.testing.assert_close((weights[0], intercepts), (w.detach(), c.detach()), rtol=1e-6, atol=1e-7)


def test_probes_in_float32_and_their_penalty():
    x, labels = draw(2, 40, 4), torch.arange(40) % 2 > 0
    exact, single = fit_probes(x, labels)[0], fit_probes(x.float(), labels)[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="l2 > 0"):
        fit_probes(x, labels, 0.0)


def answers(n, *, told_by, size=6):
    """(2n, 2, 3, size) of noise in which only the heads `told_by` see which answer is right, and labels."""
    labels = torch.tensor([True, False]).repeat(n)
    activations = torch.randn(2 * n, 2, 3, size)
    for layer, head in told_by:
        activations[:, layer, head, 0] += labels * 20.0 - 10
    return activations, labels


def test_accuracy_is_one_where_the_answers_separate_and_chance_elsewhere():
    accuracy = probe_accuracy(*answers(100, told_by=[(0, 2), (1, 1)]))
    assert (accuracy.shape, accuracy.dtype) == ((2, 3), torch.float32)
    sure = torch.tensor([[False, False, True], [False, True, False]])
    assert (accuracy[sure] == 1).all()
    # three standard deviations of 200 coins
    assert ((accuracy[~sure] - 0.5).abs() < 0.11).all()


def test_a_question_is_never_on_both_sides():
    # what tells a question's two answers apart is a sign of its own: learned on one, it is wrong or useless elsewhere
    activations, labels = answers(40, told_by=[])
    activations[:] = 0
    for question in range(40):
        activations[2 * question : 2 * question + 2, 0, 0, :] = torch.randn(6)
    assert probe_accuracy(activations, labels)[0, 0] == pytest.approx(0.5)
    splits = split_of(11, 3, seed=1)
    assert sorted(splits.bincount().tolist()) == [3, 4, 4]
    assert splits.equal(split_of(11, 3, seed=1))
    assert not splits.equal(split_of(11, 3, seed=2))


def test_a_question_that_comes_again_is_on_one_side():
    once, _ = answers(40, told_by=[], size=24)
    activations, labels = once.repeat(3, 1, 1, 1), torch.tensor([True, False]).repeat(120)
    known = [number % 40 for number in range(120)]
    assert probe_accuracy(activations, labels).min() > 0.65
    assert probe_accuracy(activations, labels, questions=known).mean() == pytest.approx(0.5, abs=0.1)
    assert layer_probe_accuracy(activations, labels, questions=known).mean() == pytest.approx(0.5, abs=0.15)
    # questions that come once are dealt as ever
    assert probe_accuracy(once, labels[:80], questions=range(40)).equal(probe_accuracy(once, labels[:80]))
    with pytest.raises(ValueError, match="splits from 2 to the 1 questions there are"):
        probe_accuracy(once, labels[:80], questions=["one"] * 40)
    with pytest.raises(ValueError, match="expected a question for every two of 80 rows, got 2"):
        probe_accuracy(once, labels[:80], questions=["one", "two"])


def test_scale_and_shift_of_a_feature_do_not_matter():
    activations, labels = answers(30, told_by=[])
    moved = activations.double() * torch.tensor([1e-4, 1, 1e4, 1, 1, 10]) + 100
    assert probe_accuracy(moved, labels).equal(probe_accuracy(activations.double(), labels))


def test_layers_are_probed_on_all_their_heads():
    activations, labels = answers(60, told_by=[(1, 2)])
    # two heads that each know half of it: the sum of two numbers
    half = 4 * torch.randn(120)
    activations[:, 0, 0, 0], activations[:, 0, 1, 0] = half, labels * 8.0 - 4 - half
    assert layer_probe_accuracy(activations, labels).tolist() == [1.0, 1.0]
    assert probe_accuracy(activations, labels)[0].max() < 0.95


def test_heads_a_layer_does_not_have():
    activations, labels = answers(20, told_by=[(0, 0)])
    activations[:, 0, 2], activations[:, 1] = math.nan, math.nan
    accuracy = probe_accuracy(activations, labels)
    assert accuracy[0, 0] == 1
    assert accuracy.isneginf().tolist() == [[False, False, True], [True, True, True]]
    assert layer_probe_accuracy(activations, labels).tolist() == [1.0, -math.inf]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, y: (a[0], y), "expected activations"),
        (lambda a, y: (a, y[:-1]), "expected activations"),
        (lambda a, y: (a, y.sort().values), "a right and a wrong"),
        (lambda a, y: (a, y.long()), "bool labels"),
        (lambda a, y: (a[:4], y[:4]), "splits from 2 to the 2 questions"),
    ],
)
def test_probes_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        probe_accuracy(*change(*answers(8, told_by=[])))


def test_activations_are_the_projections_inputs_at_the_last_token(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    z, labels = head_activations(model, tokenizer, CONTRASTS, batch_size=3)
    projections = find_projections(model)
    assert z.shape == (10, LAYERS, HEADS, projections[0].head_dim)
    assert (z.dtype, labels.tolist()) == (torch.float32, [True, False] * 5)
    texts = [c.prompt + answer for c in CONTRASTS for answer in (c.right, c.wrong)]
    for row, text in enumerate(texts):
        seen = {}
        hooks = [
            p.module.register_forward_hook(lambda _, i, __, at=p.layer, to=seen: to.update({at: i[0][0, -1]}))
            for p in projections
        ]
        with torch.no_grad():
            model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
        for hook in hooks:
            hook.remove()
        for layer in range(LAYERS):
            torch.testing.assert_close(z[row, layer].flatten(), seen[layer], rtol=1e-4, atol=1e-5)


def test_activations_leave_the_model_alone(llama):
    llama.train()
    head_activations(llama, tiny_tokenizer(), CONTRASTS)
    assert llama.training
    assert not any(m._forward_pre_hooks for m in llama.modules())
    # of a patched model they are what the adapter makes of it
    base = head_activations(llama, tiny_tokenizer(), CONTRASTS)[0]
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 1)], init_std=1.0))
    patched = head_activations(llama, tiny_tokenizer(), CONTRASTS)[0]
    assert patched[:, 0].equal(base[:, 0])
    assert not patched[:, 1].allclose(base[:, 1])
    handle.unpatch()


def test_activations_refuse(llama):
    with pytest.raises(ValueError, match="at least one contrast"):
        head_activations(llama, tiny_tokenizer(), [])
    with pytest.raises(ValueError, match="no tokens"):
        head_activations(llama, tiny_tokenizer(), [Contrast("a", "", "b")])
    with pytest.raises(ValueError, match="context of 64"):
        head_activations(llama, tiny_tokenizer(), [Contrast("a" * 64, "b", "c")])
    with pytest.raises(ValueError, match="contrast 2: the right and the wrong answer have the same tokens"):
        head_activations(llama, tiny_tokenizer(), [Contrast("a", "b", "c"), Contrast("a", "b", "b")])
