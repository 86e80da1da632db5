"""Scores, references and answers of vectors that act on answers alone, against one whole masked text at a time."""

import pytest
import torch

import lofit_fast as lf
import lofit_fast.evaluation.choices as scoring
from lofit_fast.data.encode import encode_answers, encode_prompt
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.evaluation.logprobs import log_probs
from tests.masked_hook import MaskedHook
from tests.oracle import randomize, vectors_of
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import VOCABULARY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PREFIX = "Q: a? A: b. "
QUESTIONS = ["abcdef", "q", "The quick brown fox?"]
CHOICES = [[" yes", " y", "no", " yes, sir"], ["a"], ["xx", "xy", "zzzzz"]]
PLACE = r"model\.layers\.N\.self_attn\.o_proj"


@pytest.fixture(params=["llama", "gemma3"])
def pair(request):
    """(a patched model, the same in hooks), in float64."""
    models = [tiny_model(request.param, torch.float64) for _ in range(2)]
    for model in models:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(2.0 if "embed" in name else 4.0)
    handle = lf.patch(models[0], lf.LofitConfig(scale=[(0, 1), (2, 0)], offset="all", positions="answer"))
    randomize(handle)
    return models[0], models[1], MaskedHook(models[1], PLACE, vectors_of(handle))


@torch.no_grad()
def log_p(model, hook, start, ending):
    """log p of the ending's tokens after the start's, with the vectors from the start's last token on."""
    ids = torch.tensor([start + ending])
    hook.mask = torch.arange(ids.shape[1])[None] >= len(start) - 1
    rows = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(rows[len(start) + i - 1, token].item() for i, token in enumerate(ending))


def ids_of(text):
    return [VOCABULARY[c] for c in text]


@pytest.mark.parametrize("way", ["packed", "packed, few tokens", "by question", "singly"])
def test_scores(pair, way, monkeypatch):
    patched, plain, hook = pair
    if way == "singly":
        monkeypatch.setattr(scoring, "packing_refusal", lambda model: "as asked")
    if way == "by question":
        patched.depends_on_prompt = True
    limit = {"max_tokens": 7} if way == "packed, few tokens" else {}
    got = score_choices(patched, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX, **limit)
    for question, choices, row in zip(QUESTIONS, CHOICES, got, strict=True):
        start = encode_prompt(TOKENIZER, PREFIX + question)
        expected = torch.tensor([log_p(plain, hook, start, ids_of(choice)) for choice in choices])
        assert torch.allclose(row, expected, rtol=1e-6)


def test_log_probs_of_answers_and_of_the_reference(pair):
    patched, plain, hook = pair
    questions = [("Q: ab? A:", [" yes", " no, sir"]), ("x", ["zz"])]
    rows = [row for answers in encode_answers(TOKENIZER, questions, None) for row in answers]
    cut = [row["labels"].count(-100) for row in rows]
    ids = [(row["input_ids"][:n], row["input_ids"][n:]) for row, n in zip(rows, cut, strict=True)]
    expected = torch.tensor([log_p(plain, hook, *each) for each in ids])
    assert torch.allclose(torch.tensor(log_probs(patched, rows, 0)), expected, rtol=1e-9)
    hook.remove()
    base = torch.tensor([log_p(plain, hook, *each) for each in ids])
    with lf.handle_of(patched).disabled():
        assert torch.allclose(torch.tensor(log_probs(patched, rows, 0)), base, rtol=1e-9)
    assert (base - expected).abs().min() > 1e-2


@torch.no_grad()
def test_greedy_answers(pair):
    patched, plain, hook = pair
    prompts = ["abcdef", "q", "The quick brown fox jumps!"]
    got = generate_answers(patched, TOKENIZER, prompts, max_new_tokens=5, batch_size=2)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = encode_prompt(TOKENIZER, prompt)
        start = len(ids)
        while len(ids) < start + 5 and ids[-1:] != [2]:
            hook.mask = torch.arange(len(ids))[None] >= start - 1
            ids.append(int(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert answer == TOKENIZER.decode(ids[start:], skip_special_tokens=True)
