"""Token ids without an embedding: refused by name everywhere, before anything is changed."""

import json

import pytest
import torch

import lofit_fast as lf
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers, judge
from lofit_fast.models.vocabulary import check_ids, check_padding, vocabulary_of
from lofit_fast.tasks import Example, Task
from tests.patched_models import snapshot
from tests.tiny_models import VOCAB, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXPECTED = rf"expected 0 to {VOCAB - 1}, as the model has {VOCAB} embeddings"


@pytest.fixture
def tokenizer():
    """With a token that the model has no embedding for, as one that was added without a resize."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["@@"])
    assert tokenizer("@@", add_special_tokens=False)["input_ids"] == [VOCAB]
    return tokenizer


def rows(*texts):
    return [Example(text, "b") for text in texts]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1], [5, 97, 3]], r"example 2: token 2 of 3 has the id 97, "),
        ([[-1]], r"example 1: token 1 of 1 has the id -1, "),
    ],
)
def test_an_id_is_named_with_its_place_and_the_vocabulary(llama, ids, message):
    with pytest.raises(ValueError, match=message + EXPECTED):
        check_ids(llama, ids)
    check_ids(llama, [[], [0, VOCAB - 1]])


def test_a_model_that_does_not_say_is_not_asked():
    assert vocabulary_of(torch.nn.Linear(2, 2)) is None
    check_ids(torch.nn.Linear(2, 2), [[10**9]])


def test_padding_is_checked_where_rows_are_filled(llama):
    with pytest.raises(ValueError, match=rf"padding token has the id 97, {EXPECTED}"):
        check_padding(llama, VOCAB, [[1], [1, 2]])
    check_padding(llama, VOCAB, [[1]])
    check_padding(llama, None, [[1], [2]])


# what asks a model -> what is wrong in its words
ASKED = {
    "generate": (lambda m, t: generate_answers(m, t, ["a", "b@@c"]), "prompt 2: token 3 of 4"),
    "judge": (lambda m, t: judge(m, t, Task("mine", [], rows("a@@"))), "prompt 1: token 3 of 3"),
    "score": (lambda m, t: score_choices(m, t, ["a"], [["b", "@@"]]), "question 1, choice 2: token 1 of 1"),
    "score, question": (lambda m, t: score_choices(m, t, ["a@@"], [["b", "c"]]), "question 1: token 3 of 3"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_whoever_asks_a_model_is_told(tokenizer, asked):
    model = tiny_model("llama").train()
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    before, (ask, message) = snapshot(model), ASKED[asked]
    with pytest.raises(ValueError, match=f"{message} has the id {VOCAB}, {EXPECTED}"):
        ask(model, tokenizer)
    assert snapshot(model) == before and handle.scopes.plain


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (["a", "b@@"], [], "example 2: token 3"),
        (["a"], ["b", "c", "@@"], "evaluation example 3: token 2"),
    ],
)
def test_a_fit_is_refused_before_it_writes(llama, tokenizer, tmp_path, train, held_out, message):
    before = snapshot(llama)
    with pytest.raises(ValueError, match=f"{message} of .* has the id {VOCAB}, {EXPECTED}"):
        lf.fit(llama, tokenizer, rows(*train), output_dir=tmp_path / "run", eval_data=rows(*held_out) or None)
    assert snapshot(llama) == before and not (tmp_path / "run").exists()


def test_a_fit_on_preferences_is_refused_too(llama, tokenizer, tmp_path):
    pytest.importorskip("trl")
    preferences = [{"prompt": "a", "chosen": "b", "rejected": ["c", "@@"]}]
    with pytest.raises(ValueError, match=f"preference 1, answer 3: token .* has the id {VOCAB}, {EXPECTED}"):
        lf.fit_preferences(llama, tokenizer, preferences, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_padding_token_without_an_embedding(llama, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    message = f"padding token has the id {VOCAB}, {EXPECTED}"
    with pytest.raises(ValueError, match=message):
        generate_answers(llama, tokenizer, ["a", "bcd"])
    with pytest.raises(ValueError, match=message):
        lf.fit(llama, tokenizer, rows("a", "bcd"), output_dir=tmp_path / "run")


def test_the_command_says_it(tmp_path, tokenizer):
    from tests.cli.calling import error_of

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(10 * (json.dumps({"prompt": "a@@", "completion": "b"}) + "\n"))
    for command in (("generate", "-p", "a@@"), ("eval", "--data", tmp_path / "data.jsonl")):
        message = error_of(*command, "--model", tmp_path / "model", "--device", "cpu")
        assert f"has the id {VOCAB}" in message and "prompt 1" in message
