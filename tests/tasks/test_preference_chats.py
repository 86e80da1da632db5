"""Preferences that are chats: the answers are what training on the same chats learns, ended as the template ends."""

import json
from functools import partial

import pytest

import lofit_fast as lf
from lofit_fast.data.encode import IGNORED, as_example, encode, encode_answers
from lofit_fast.tasks.chat import Rendered, conversation
from lofit_fast.tasks.completion import completion
from lofit_fast.tasks.preference_rows import as_preference
from lofit_fast.tasks.task import Example
from lofit_fast.training.dry_run import dry_run
from lofit_fast.training.objectives import Preferences
from tests.chat_templates import FAMILIES, TOOLS
from tests.tasks.row_writers import write
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chat_tokenizer

QUESTION = {"role": "user", "content": "Two and two?"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("Four.", "Five, or six.")]


def _task(name, tmp_path):
    family = FAMILIES[name]
    tokenizer = chat_tokenizer(family.kind, family.template, family.special, family.preamble)
    row = {"prompt": [QUESTION], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    return tokenizer, completion(tmp_path / "a.jsonl", tokenizer, validation=0)


def _learned(row):
    return [label for label in row["labels"] if label != IGNORED]


FOR_TEMPLATE = {"tools": [{"type": "function", "function": {"name": "add"}}], "chat_template_kwargs": {"mood": "calm"}}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_for_the_template_reaches_it(tmp_path, suffix):
    tokenizer = chat_tokenizer(
        "qwen", "{% if mood %}mood {{ mood }}\n{% endif %}" + TOOLS, ("<|im_start|>", "<|im_end|>")
    )
    talk = {"chosen": [QUESTION, ANSWERS[0]], "rejected": [QUESTION, ANSWERS[1]]}
    path = write(tmp_path / f"a{suffix}", [{**talk, **FOR_TEMPLATE}, {**talk, **dict.fromkeys(FOR_TEMPLATE)}])
    with_both, without = completion(path, tokenizer, validation=0).preferences
    options = {"tools": FOR_TEMPLATE["tools"], "options": FOR_TEMPLATE["chat_template_kwargs"]}
    assert with_both.prompt == conversation([QUESTION, ANSWERS[0]], tokenizer, **options).prompt
    assert "mood calm" in with_both.prompt and '"add"' in with_both.prompt
    assert without.prompt == conversation([QUESTION, ANSWERS[0]], tokenizer).prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": 7}, "tools must be a list of tools, got int"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs must map names of variables to values, got 'x'"),
    ],
)
def test_what_the_template_cannot_read_is_refused_with_its_row(tmp_path, row, message):
    talk = {"chosen": [QUESTION, ANSWERS[0]], "rejected": [QUESTION, ANSWERS[1]]}
    tokenizer, _ = _task("gemma", tmp_path)
    with pytest.raises(ValueError, match=rf"b\.jsonl: line 2: {message}"):
        completion(write(tmp_path / "b.jsonl", [talk, {**talk, **row}]), tokenizer)


@pytest.mark.parametrize("texts", [{"prompt": "p", "completion": "c"}, {"prompt": "p", "chosen": "a", "rejected": "b"}])
@pytest.mark.parametrize("name", FOR_TEMPLATE)
def test_what_is_for_the_template_is_refused_beside_texts(tmp_path, texts, name):
    row, nothing = {**texts, name: FOR_TEMPLATE[name]}, {**texts, **dict.fromkeys(FOR_TEMPLATE)}
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: got {name} beside texts.*expected messages"):
        completion(write(tmp_path / "a.jsonl", [nothing, row]))
    made = as_example if "completion" in texts else partial(as_preference, where="row 1")
    made(nothing)
    with pytest.raises(ValueError, match=f"got {name} beside texts.*expected messages"):
        made(row)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_end_as_the_template_ends_them(tmp_path, name):
    try:
        tokenizer, task = _task(name, tmp_path)
    except ValueError:
        pytest.skip("this template refuses the chat")
    (pair,) = task.preferences
    (rows,) = encode_answers(tokenizer, [(pair.prompt, (pair.chosen, *pair.rejected))], None)
    for answer, row in zip(ANSWERS, rows, strict=True):
        expected = encode(tokenizer, conversation([QUESTION, answer], tokenizer), None)
        assert _learned(row) == _learned(expected)
        # a line break after the ending is read by nothing
        assert row["input_ids"] == expected["input_ids"][: len(row["input_ids"])]


def test_the_references_and_the_dry_run_read_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    tokenizer, task = _task("gemma", tmp_path)
    (pair,) = task.preferences
    (rows,) = encode_answers(tokenizer, [(pair.prompt, (pair.chosen, *pair.rejected))], None)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    found = dry_run(model, tokenizer, Preferences(task.preferences), lf.Recipe(top=2))
    assert found.tokens == sum(len(row["input_ids"]) for row in rows)
    assert encode(tokenizer, Example(pair.prompt, pair.chosen), None) == rows[0]
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1)]))
    texts = {"prompt": [pair.prompt], "chosen": [pair.chosen], "rejected": [*pair.rejected]}
    marks = {f"{name}_rendered": [True] for name in texts}
    (done,) = lf.reference_logprobs(handle, datasets.Dataset.from_dict({**texts, **marks}), tokenizer)
    assert [done["prompt_ids"] + done[f"{side}_ids"] for side in ("chosen", "rejected")] == [
        row["input_ids"] for row in rows
    ]


def test_training_gives_trl_the_templates_ending(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    tokenizer, task = _task("gemma", tmp_path)
    seen = []
    from lofit_fast.training import encoded_preferences

    references = encoded_preferences.reference_logprobs

    def watched(*args, **options):
        seen.append(references(*args, **options))
        return seen[-1]

    monkeypatch.setattr(encoded_preferences, "reference_logprobs", watched)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    recipe = lf.Recipe(select_epochs=1, tune_epochs=1, top=2, batch_size=1)
    lf.fit_preferences(model, tokenizer, task.preferences, recipe, output_dir=tmp_path / "run")
    ending = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for done in seen:
        for side in ("chosen", "rejected"):
            assert [ids[-1] for ids in done[f"{side}_ids"]] == [ending] * len(done)


def test_an_answer_of_plain_text_still_gets_the_end_token(tmp_path):
    tokenizer, task = _task("gemma", tmp_path)
    (pair,) = task.preferences
    (rows,) = encode_answers(tokenizer, [(Rendered(pair.prompt), ("Four.",))], None)
    assert rows[0]["labels"][-1] == tokenizer.eos_token_id
