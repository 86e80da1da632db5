"""Prompt and answer as one text: on tokenizers of many kinds, random pairs each, or with a warning."""

import random
import unicodedata
import warnings

import pytest

from lofit_fast.data.encode import (
    IGNORED,
    BoundaryWarning,
    answer_tokens,
    branches,
    encode,
    encode_all,
    encode_answers,
    encode_pair,
    encode_prompt,
)
from lofit_fast.models.load import ALIASES, resolve
from lofit_fast.tasks import Example
from lofit_fast.tasks.chat import Rendered
from tests.tiny_tokenizers import BOS, EOS, KINDS, Slow, kind_tokenizer, tiny_tokenizer

PIECES = (
    *("the", "who", "Paris", "letter", "x", "y", "12", "46", "def", "it's", "caf\u00e9", "\u6771\u4eac", "\U0001f642"),
    *(" ", " ", " ", " ", "  ", "\n", "\n\n", ":", ".", "? ", ", ", "(", ")", "//", "'", "\t", "e\u0301"),
)
PAIRS, FEW = 1000, 250
REAL = ("smollm2", "gemma3-270m")


def real_tokenizer(name):
    file = ALIASES[name].locate()
    if file is None or not file.is_file():
        pytest.skip(f"the packaged model {name} is not installed: {ALIASES[name].install}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(name))


def some_pairs(count, seed=0):
    drawn = random.Random(seed)

    def text():
        return "".join(drawn.choice(PIECES) for _ in range(drawn.randint(1, 8)))

    found = ((text(), text()) for _ in range(10 * count))
    return [(prompt, answer) for prompt, answer in found if answer.strip()][:count]


def told(tokenizer, example):
    """(encoded, whether a warning was given)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = encode(tokenizer, example, None)
    return row, any(w.category is BoundaryWarning for w in caught)


def composed(text):
    return unicodedata.normalize("NFC", text)


def check_pairs(tokenizer, pairs):
    """How many were warned of; the others are the joined tokens, cut where the prompt's own end."""
    warned = 0
    for prompt, answer in pairs:
        row, moved = told(tokenizer, Example(prompt, answer))
        warned += moved
        joined, alone = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
        start = row["labels"].count(IGNORED)
        assert row["labels"][start:] == row["input_ids"][start:]
        assert moved == (joined[: len(alone)] != alone)
        if not moved:
            assert row["input_ids"] == [*joined, tokenizer.eos_token_id] and start == len(alone)
        elif row["input_ids"][:-1] != joined:
            # nothing stands before the token that both share
            assert row["input_ids"][:start] == alone
        else:
            before, through = (tokenizer.decode(joined[:n], skip_special_tokens=True) for n in (start, start + 1))
            # some put a space before every text, and some compose letters and accents
            extra = len(composed(tokenizer.decode(joined, skip_special_tokens=True))) - len(composed(prompt + answer))
            assert "\ufffd" in before + through or len(composed(before)) <= len(composed(prompt)) + extra
            assert "\ufffd" in before + through or len(composed(prompt)) + extra < len(composed(through))
    return warned


@pytest.mark.parametrize("pairs", [FEW, pytest.param(PAIRS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_equals_the_text_or_is_warned_of(kind, pairs):
    warned = check_pairs(kind_tokenizer(kind), some_pairs(pairs))
    assert 0 < warned < pairs / 2


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_joined_equals_the_text_of_real_tokenizers(name):
    tokenizer = real_tokenizer(name)
    assert 0 < check_pairs(tokenizer, some_pairs(PAIRS)) < PAIRS / 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_brings_its_space_is_joined_without_a_word(kind):
    tokenizer = kind_tokenizer(kind)
    joined = tokenizer("A: x")["input_ids"]
    with warnings.catch_warnings(action="error"):
        assert encode(tokenizer, Example("A:", " x"), None)["input_ids"] == [*joined, tokenizer.eos_token_id]
        assert encode_pair(tokenizer, "A:", " x") == joined
        assert encode_all(tokenizer, [{"prompt": "A:", "completion": " x"}] * 3, None)[2]["input_ids"][:-1] == joined


def test_one_warning_for_a_data_set():
    tokenizer = kind_tokenizer("qwen")
    data = [Example("A:", " yes"), Example("A: ", "yes"), Example("Q: ", "no")]
    with pytest.warns(
        BoundaryWarning, match="in 2 of 3 examples .* 'A: ' goes on ' ' alone and .* before 'yes'"
    ) as got:
        rows = encode_all(tokenizer, data, None)
    assert len(got) == 1
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    # the space goes with the word, and is learned with it
    assert rows[0]["labels"] == rows[1]["labels"]


def test_a_first_token_of_both_is_tokenized_apart():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_tokens(["ab"])
    with pytest.warns(BoundaryWarning, match="with nothing before it, so that they are tokenized apart"):
        row = encode(tokenizer, Example("a", "bc"), None)
    assert row["input_ids"] == [*tokenizer("a")["input_ids"], *tokenizer("bc")["input_ids"], 2]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    # behind another token, it is one
    with_bos = tiny_tokenizer()
    with_bos.add_tokens(["ab"])
    with pytest.warns(BoundaryWarning):
        assert encode(with_bos, Example("a", "b"), None)["labels"] == [IGNORED, with_bos.vocab["ab"], 2]


@pytest.mark.parametrize("kind", ["gpt2", "llama2_legacy", "mistral_v01"])
def test_a_slow_tokenizer_finds_the_boundary_by_the_prompts_tokens(kind):
    fast = kind_tokenizer(kind)
    for prompt, answer in some_pairs(60, seed=1):
        (row, moved), (quick, _) = told(Slow(fast), Example(prompt, answer)), told(fast, Example(prompt, answer))
        assert row["input_ids"] == quick["input_ids"]
        assert moved or row == quick
        # before the first token that differs from the prompt's
        assert row["labels"].count(IGNORED) <= quick["labels"].count(IGNORED)


def test_answers_to_one_prompt_begin_at_one_place():
    tokenizer = kind_tokenizer("qwen")
    clean = branches(tokenizer, "A:", [" yes", " no"])
    assert clean.start == encode_prompt(tokenizer, "A:") and not clean.moved
    # "1" leaves the space alone, "yes" takes it along: both are scored from before the space
    moved = branches(tokenizer, "A: ", ["yes", "1"])
    assert moved.start == clean.start and moved.moved
    assert [tokenizer.decode(ending) for ending in moved.endings] == [" yes", " 1"]
    with pytest.warns(BoundaryWarning, match="in 1 of 2"):
        (_, rows) = encode_answers(tokenizer, [("A:", [" yes"]), ("A: ", ["yes", "1"])], None)
    assert [row["labels"].count(IGNORED) for row in rows] == [len(clean.start)] * 2
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_room_for_an_answer_is_what_its_labels_take(kind):
    tokenizer = kind_tokenizer(kind)
    for prompt, answer in (("A:", " yes"), ("who is it?", " the letter"), ("A: ", "yes")):
        row, _ = told(tokenizer, Example(prompt, answer))
        learned = len(row["labels"]) - row["labels"].count(IGNORED)
        assert learned <= answer_tokens(tokenizer, Example(prompt, answer)) <= learned + 2


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_for_the_longest_answer_that_counts(kind):
    tokenizer = kind_tokenizer(kind)
    long = "the letter " * 8
    whole = answer_tokens(tokenizer, Example("A:", " " + long.strip()))
    assert answer_tokens(tokenizer, Example("A:", " yes")) < whole
    for answers in (("yes", long), (long, "no"), (" " + long,)):
        got = answer_tokens(tokenizer, Example("A:", " yes", answers))
        assert whole <= got <= whole + 1


def test_special_tokens_of_a_text_are_its_own():
    tokenizer = kind_tokenizer("llama3")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "x") == encode_prompt(tokenizer, BOS + "x") == [bos, *plain]
    # a rendered text gets none, whether it has one or not
    assert encode_prompt(tokenizer, Rendered("x")) == plain
    assert encode_prompt(tokenizer, Rendered(BOS + "x")) == [bos, *plain]
    # an end that the text has is part of it; an end that the answer has is the one
    assert encode_prompt(tokenizer, "x" + EOS) == [bos, *plain, eos]
    assert encode(tokenizer, Example("x", " y" + EOS), None) == encode(tokenizer, Example("x", " y"), None)


def test_a_preamble_of_two_tokens_comes_once():
    from tokenizers import processors

    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    pair = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=pair
    )
    once = [number for _, number in pair] + tiny_tokenizer(bos=False)("ab")["input_ids"]
    assert encode_prompt(tokenizer, "ab") == encode_prompt(tokenizer, "[gMASK]<sop>ab") == once
    assert encode_prompt(tokenizer, Rendered("[gMASK]<sop>ab")) == once
