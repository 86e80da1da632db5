"""Preferences of one's own: what the rows may look like, what is held out, and what is refused."""

import json

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.completion import completion
from lofit_fast.tasks.preference_rows import as_preference
from lofit_fast.tasks.task import MultipleChoice, Preference
from tests.tasks.row_writers import write
from tests.tiny_tokenizers import tiny_tokenizer

PAIRS = [{"prompt": f"Q{i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(20)]
SEVERAL = [{**pair, "rejected": [" no", " never"]} for pair in PAIRS]


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_share_is_held_out_as_choices(tmp_path, suffix):
    task = completion(write(tmp_path / f"a{suffix}", PAIRS))
    assert (task.name, task.train, task.validation) == ("preferences", [], [])
    assert (len(task.preferences), len(task.choices)) == (18, 2)
    assert task.preferences[0] == Preference("Q0:", " yes 0", (" no",))
    held_out = [PAIRS[int(choice.prompt[1:-1])] for choice in task.choices]
    expected = [MultipleChoice(p["prompt"], (p["chosen"], p["rejected"]), (0,), 0, ends=True) for p in held_out]
    assert expected == [*task.choices]
    # the same share as completions of as many rows have
    completions = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    same = completion(write(tmp_path / "b.jsonl", completions))
    assert [example.prompt for example in same.validation] == [choice.prompt for choice in task.choices]


def test_train_size_seed_and_a_second_file(tmp_path):
    path = write(tmp_path / "a.jsonl", SEVERAL)
    whole, five = completion(path), completion(path, train_size=5)
    assert five.choices == whole.choices and len(five.preferences) == 5
    assert completion(path, seed=1).choices != whole.choices
    assert whole.preferences[0].rejected == whole.choices[0].choices[1:] == (" no", " never")
    second = load_task("completion", path, validation=write(tmp_path / "b.jsonl", PAIRS[:3]))
    assert (len(second.preferences), len(second.choices)) == (20, 3)
    with pytest.raises(ValueError, match=r"a\.jsonl holds preferences and .*c\.jsonl holds completions"):
        completion(path, validation=write(tmp_path / "c.jsonl", [{"prompt": "x", "completion": "y"}]))


TALK = messages("Hi", "Hello", "Well?")
RENDERED = Preference("<s>[user]Hi[assistant]Hello[user]Well?[assistant]", "Fine", ("Bad",))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": messages("", "Fine")[1:], "rejected": messages("", "Bad")[1:]},
        {"chosen": [*TALK, *messages("", "Fine")[1:]], "rejected": [*TALK, *messages("", "Bad")[1:]]},
        {"prompt": TALK, "chosen": [*TALK, *messages("", "Fine")[1:]], "rejected": [*TALK, *messages("", "Bad")[1:]]},
        {
            "prompt": "Well?",
            "chosen": [*TALK, *messages("", "Fine")[1:]],
            "rejected": [[*TALK, *messages("", "Bad")[1:]]],
        },
    ],
    ids=["prompt apart", "whole conversations", "their beginning as prompt", "prompt as the last question"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_go_through_the_template(tmp_path, row, suffix):
    path = write(tmp_path / f"a{suffix}", [row])
    assert completion(path, tiny_tokenizer(chat=True), validation=0).preferences == (RENDERED,)
    with pytest.raises(ValueError, match=rf"a{suffix}: .* 1: messages need a tokenizer with a chat template"):
        completion(path, tiny_tokenizer())


FINE, BAD = messages("Well?", "Fine"), messages("Well?", "Bad")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            r"got the keys \['chosen', 'rejected'\], expected the keys prompt, chosen and",
        ),
        (
            {"prompt": "p", "chosen": "a"},
            r"got the keys \['chosen', 'prompt'\], expected the keys prompt and completion",
        ),
        (
            {"prompt": None, "chosen": "a", "rejected": "b"},
            "prompt must be a string, got NoneType, an empty cell or null",
        ),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "chosen must be a string, got int"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "chosen must hold some text"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "rejected must be a text or a list of texts, got NoneType"),
        ({"prompt": "p", "chosen": "a", "rejected": {"x": 1}}, "rejected must be a text or a list of texts, got dict"),
        ({"prompt": "p", "chosen": "a", "rejected": []}, "expected rejected answers other than 'a'"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b", 2]}, "every answer must be a string, got int"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b", ""]}, "rejected must hold some text, got ''"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "expected rejected answers other than 'a'"),
        ({"chosen": FINE, "rejected": "Bad"}, "chosen is a list of messages: rejected must be one too"),
        (
            {"prompt": "Eh?", "chosen": FINE, "rejected": BAD},
            "prompt must be the messages before the answers, or the te",
        ),
        ({"chosen": FINE, "rejected": messages("What?", "Bad")}, "must differ in the assistant's last message only"),
        ({"chosen": FINE, "rejected": messages("Well?")}, "must differ in the assistant's last message only"),
        ({"chosen": messages("Well?"), "rejected": messages("Eh?")}, "messages must be a list of two or more"),
        (
            {**PAIRS[0], "messages": FINE},
            "are a preference and a chat: choose by naming a column of one, with --columns",
        ),
        ({**PAIRS[0], "completion": "c"}, "are a preference and a completion: choose"),
    ],
)
def test_what_is_no_preference_is_refused_with_its_row(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: .*{message}"):
        completion(write(tmp_path / "a.jsonl", [PAIRS[0], row]), tiny_tokenizer(chat=True))


@pytest.mark.parametrize("other", [{"prompt": "p", "completion": "c"}, {"messages": FINE}])
def test_rows_of_two_kinds_are_refused(tmp_path, other):
    preference, answer = r"a preference \(chosen, rejected\)", r"an answer to learn \(completion or messages\)"
    for rows, got, first in (([*PAIRS, other], answer, preference), ([other, *PAIRS], preference, answer)):
        path = write(tmp_path / "a.jsonl", rows)
        line = len(rows) if got is answer else 2
        message = rf"a\.jsonl: line {line}: got {got}, but .*a\.jsonl: line 1 holds {first}: expected one of the two"
        with pytest.raises(ValueError, match=message):
            completion(path, tiny_tokenizer(chat=True))


def test_columns_choose_what_rows_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**pair, "messages": FINE} for pair in PAIRS])
    tokenizer = tiny_tokenizer(chat=True)
    assert completion(path, tokenizer, columns={"rejected": "rejected"}).preferences
    assert completion(path, tokenizer, columns={"messages": "messages"}).train[0].completion == "Fine"
    # what was chosen can be learned as a completion
    assert completion(path, tokenizer, columns={"completion": "chosen"}).train[0].completion == " yes 0"
    theirs = write(tmp_path / "b.jsonl", [{"q": p["prompt"], "+": p["chosen"], "-": p["rejected"]} for p in PAIRS])
    assert len(completion(theirs, columns={"prompt": "q", "chosen": "+", "rejected": "-"}).preferences) == 18


def test_in_python():
    assert as_preference(PAIRS[0], "row 1") == as_preference(Preference("Q0:", " yes 0", (" no",)), "row 1")
    with pytest.raises(ValueError, match="row 1: got messages, expected texts: load the rows with load_task"):
        as_preference({"chosen": FINE, "rejected": BAD}, "row 1")
    with pytest.raises(ValueError, match=r"row 1: got the keys \['a'\], expected the keys prompt, chosen and rejected"):
        as_preference({"a": 1}, "row 1")


def test_a_prompt_and_a_completion_of_messages_are_a_chat(tmp_path):
    row = {"prompt": TALK, "completion": messages("", "Fine")[1:]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (example,) = completion(tmp_path / "a.jsonl", tiny_tokenizer(chat=True), validation=0).train
    assert (example.prompt, example.completion) == (RENDERED.prompt, "Fine")


def test_what_prompt_and_answers_both_hold_is_asked_once(tmp_path):
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": text} for text in ("Fine", "Bad")]
    tokenizer = tiny_tokenizer(chat=True)
    expected = as_texts(tmp_path, tokenizer, [system, question], answers[:1], answers[1:])
    again = {"role": "user", "content": " Hi ", "name": "me"}
    for before in ([question], [system, question], [again]):
        talks = ([*before, answer] for answer in answers)
        assert as_texts(tmp_path, tokenizer, [system, question], *talks) == expected
    row = {"prompt": [system, question], "completion": [question, answers[0]]}
    (example,) = completion(write(tmp_path / "c.jsonl", [row]), tokenizer, validation=0).train
    assert example.prompt == expected[0]


def as_texts(tmp_path, tokenizer, prompt, chosen, rejected):
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    (found,) = completion(path, tokenizer, validation=0).preferences
    return found.prompt, found.chosen, found.rejected


def test_columns_without_values_are_no_other_kind(tmp_path):
    rows = [{"prompt": "Q:", "completion": " A", "messages": None, "chosen": None, "rejected": None}] * 3
    assert completion(write(tmp_path / "a.jsonl", rows)).train[0].completion == " A"


def test_a_row_that_is_a_chat_and_a_completion_is_what_its_columns_say(tmp_path):
    row = {"prompt": "Q:", "completion": " plain", "messages": messages("Hi", "Hello")}
    path = write(tmp_path / "both.jsonl", [row] * 3)
    with pytest.raises(ValueError, match=r"which are a completion and a chat: choose by naming a column of one"):
        completion(path, tiny_tokenizer(chat=True))
    chat = completion(path, tiny_tokenizer(chat=True), columns={"messages": "messages"})
    assert {example.completion for example in chat.train} == {"Hello"}
    plain = completion(path, tiny_tokenizer(chat=True), columns={"completion": "completion"})
    assert {example.completion for example in plain.train} == {" plain"}
