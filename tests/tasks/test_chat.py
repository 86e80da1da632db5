"""Conversations: what is learned of each family's rendering, what is refused, and that nothing else is put in."""

import importlib.util
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest

from lofit_fast.data.encode import IGNORED, encode, encode_prompt
from lofit_fast.tasks.chat import Conversation, Rendered, conversation, conversation_of
from lofit_fast.tasks.completion import completion
from tests.chat_templates import CHATML, FAMILIES, GPT_OSS, MARKED, PHI, QWEN3, TOOLS
from tests.tiny_tokenizers import Slow, chat_tokenizer, kind_tokenizer

IM = ("<|im_start|>", "<|im_end|>")
MESSAGES = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": " Four. "},
]


def tokenizer_of(family):
    return chat_tokenizer(family.kind, family.template, family.special, family.preamble)


def learned(tokenizer, row):
    """The texts of neighbouring tokens with labels."""
    texts, run = [], []
    for token, label in [*zip(row["input_ids"], row["labels"], strict=True), (None, IGNORED)]:
        assert label in (IGNORED, token)
        if label != IGNORED:
            run.append(token)
        elif run:
            texts.append(text_of(tokenizer, run))
            run = []
    return texts


def text_of(tokenizer, ids):
    # one at a time, as a decoder strips or adds what depends on neighbours
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if "\u2581" in tokenizer.vocab:
        text = "".join(tokens).replace("\u2581", " ")
        return re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_learned_of_a_conversation(family, train_on):
    tokenizer = tokenizer_of(family)
    expected = family.every if train_on == "all" else family.last
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected[1:]):
            conversation(MESSAGES, tokenizer, train_on=train_on)
        return
    talk = conversation(MESSAGES, tokenizer, train_on=train_on)
    with warnings.catch_warnings(action="error"):
        row = encode(tokenizer, talk, None)
    assert tuple(learned(tokenizer, row)) == expected
    # the template's own tokens: no beginning or preamble besides, and no end unless it has none
    rendered = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert row["input_ids"] == rendered + [tokenizer.eos_token_id] * (not talk.ended)
    # a model to answer is given the beginning of what was trained on
    prompt = encode_prompt(tokenizer, talk.prompt)
    assert prompt == tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True)["input_ids"]
    assert rendered[: len(prompt)] == prompt
    assert talk.text.startswith(talk.prompt + talk.completion)
    assert talk.answers[0] == "Four."


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "llama2", "phi", "gpt-oss", "qwen3"])
def test_one_turn(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    row = encode(tokenizer, {"messages": MESSAGES[2:]}, None)
    assert tuple(learned(tokenizer, row)) == family.last


def test_thinking_is_learned_where_the_template_keeps_it():
    tokenizer = chat_tokenizer("qwen", QWEN3, IM)
    thinking = [*MESSAGES[:3], {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}]
    talk = conversation(thinking, tokenizer, train_on="last")
    assert learned(tokenizer, encode(tokenizer, talk, None)) == ["<think>\n2 + 2\n</think>\n\nFour.<|im_end|>"]
    assert (talk.marker, talk.ending) == ("</think>", "<|im_end|>")
    assert talk.said("<think>\nhm\n</think>\n\nFive.<|im_end|>\n").strip() == "Five."
    # the template's variables come with the row
    without = {"messages": MESSAGES[2:], "chat_template_kwargs": {"enable_thinking": False}}
    assert learned(tokenizer, encode(tokenizer, without, None)) == [" Four. <|im_end|>"]


def test_thinking_inside_a_content_may_be_left_out_of_earlier_turns():
    template = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    tokenizer = chat_tokenizer("qwen", template, IM)
    thinking = {"role": "assistant", "content": "<think>hm</think>Hello."}
    talk = conversation([MESSAGES[0], thinking, *MESSAGES[2:]], tokenizer, train_on="last")
    assert learned(tokenizer, encode(tokenizer, talk, None)) == [" Four. <|im_end|>"]
    assert "hm" not in talk.text
    with pytest.raises(ValueError, match="message 2 .* changes earlier turns"):
        conversation([MESSAGES[0], thinking, *MESSAGES[2:]], tokenizer)
    assert "hm" in conversation([MESSAGES[0], thinking], tokenizer).completion


def test_channels_are_learned_and_the_final_one_judged():
    family = FAMILIES["gpt-oss"]
    tokenizer = chat_tokenizer("qwen", GPT_OSS, family.special)
    talk = conversation([MESSAGES[2], {"role": "assistant", "content": "Four.", "thinking": "2 + 2"}], tokenizer)
    written = "<|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    assert learned(tokenizer, encode(tokenizer, talk, None)) == [written]
    assert talk.said(written) == "Four." and (talk.marker, talk.ending) == ("<|message|>", "<|return|>")


def test_tools_and_other_fields_reach_the_template():
    tokenizer = chat_tokenizer("qwen", TOOLS, IM)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": "Four."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "description": "Adds."}}],
    }
    encoded = encode(tokenizer, row, None)
    expected = tokenizer.apply_chat_template(row["messages"], tools=row["tools"])["input_ids"]
    assert encoded["input_ids"] == expected
    assert learned(tokenizer, encoded) == [
        '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call><|im_end|>',
        "Four.<|im_end|>",
    ]
    # a last turn that is a call
    called = conversation(row["messages"][:3], tokenizer, tools=row["tools"])
    assert called.answers == (called.completion,) and called.completion.startswith("<tool_call>")


def test_a_mark_that_begins_with_a_space_is_no_reason_to_lose_the_turns():
    # transformers' own mask stops at a block whose first character belongs to no token's offsets
    template = MARKED.replace("{% generation %}", "{% generation %} ")
    tokenizer = chat_tokenizer("gpt2", template, IM)
    row = encode(tokenizer, {"messages": MESSAGES}, None)
    assert learned(tokenizer, row) == [" Hello.<|im_end|>", "  Four. <|im_end|>"]


def test_turns_are_found_without_offsets_where_they_can_be():
    tokenizer = chat_tokenizer("qwen", CHATML, IM)
    talk = conversation(MESSAGES, tokenizer)
    assert encode(Slow(tokenizer), talk, None) == encode(tokenizer, talk, None)
    # the end of a turn and the line break after it are one token
    merging = tokenizer_of(FAMILIES["no endings"])
    with pytest.raises(ValueError, match=r"up to .* Hello\.' change with what follows: expected a fast tokenizer"):
        encode(Slow(merging), conversation(MESSAGES, merging), None)


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ("hello", {}, "messages must be a list of two or more"),
        (MESSAGES[:1], {}, "messages must be a list of two or more"),
        ([MESSAGES[0], {**MESSAGES[1], "weight": 0}], {}, "got a turn with weight=0, which no template reads"),
        ([MESSAGES[0], {**MESSAGES[1], "train": False}], {}, "got a turn with train=False, which no template reads"),
        (MESSAGES[:3], {}, "the last message must be from the assistant, got 'user'"),
        ([{"role": "user", "content": None}, MESSAGES[1]], {}, "the texts role and content"),
        ([{"role": "user", "content": ["x"]}, MESSAGES[1]], {}, "the texts role and content"),
        (MESSAGES, {"train_on": "first"}, "train_on: got 'first', expected all or last"),
        ([MESSAGES[0], {"role": "assistant", "content": "  "}], {}, "completion must hold some text"),
        ([MESSAGES[1], *MESSAGES], {}, r"message 1 \(assistant\) cannot be found: .* --train-on last"),
    ],
)
def test_what_is_no_conversation(messages, options, said):
    with pytest.raises(ValueError, match=said):
        conversation(messages, chat_tokenizer("qwen", CHATML, IM), **options)


def test_a_template_that_refuses_is_quoted():
    family = FAMILIES["gemma"]
    with pytest.raises(ValueError, match="the chat template refused the messages: no system role"):
        conversation([{"role": "system", "content": "x"}, *MESSAGES], tokenizer_of(family))
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template, got one without"):
        conversation(MESSAGES, kind_tokenizer("qwen"))


def published():
    """The templates that TRL ships, by name: those of families as published, and its own variants of them."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates" if spec else Path()
    return sorted(folder.glob("*.jinja"))


@pytest.fixture(scope="module")
def every_token():
    tags = {tag for path in published() for tag in re.findall(r"<[|\uff5c]?\w[^<>\s'\"]*>", path.read_text())}
    return chat_tokenizer("qwen", "", sorted(tags))


@pytest.mark.skipif(not published(), reason="TRL, which ships chat templates, is not installed")
@pytest.mark.filterwarnings("ignore::lofit_fast.data.encode.BoundaryWarning")
@pytest.mark.parametrize(
    "paths", [published()[::6], pytest.param(published(), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_published_templates_are_right_or_refused(every_token, paths):
    right = 0
    for path in paths:
        every_token.chat_template = path.read_text()
        for train_on in ("all", "last"):
            try:
                talk = conversation(MESSAGES, every_token, train_on=train_on)
            except ValueError as error:
                assert re.search(r"message \d \(\w+\)|refused the messages", str(error)), (path.name, error)
                continue
            row = encode(every_token, talk, None)
            rendered = every_token.apply_chat_template(MESSAGES)["input_ids"]
            assert row["input_ids"] == rendered + [every_token.eos_token_id] * (not talk.ended), path.name
            turns = learned(every_token, row)
            assert len(turns) == (2 if train_on == "all" else 1) and "Four." in turns[-1], path.name
            assert not any("Two and two" in turn or "Hi?" in turn for turn in turns), path.name
            # it ends with a token that ends it
            assert turns[-1].rstrip().endswith(">"), path.name
            right += 1
    assert right > len(paths)


def test_rows_are_read_with_train_on(tmp_path):
    tokenizer, path = chat_tokenizer("qwen", PHI, FAMILIES["phi"].special), tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    for train_on, count in (("all", 2), ("last", 1)):
        (example,) = completion(path, tokenizer, validation=0, train_on=train_on).train
        assert isinstance(example, Conversation) and len(example.learned) == count
    assert completion(path, tokenizer, validation=0) == completion(path, tokenizer, validation=0, train_on="all")
    assert pickle.loads(pickle.dumps(example)) == example
    assert isinstance(pickle.loads(pickle.dumps(example)).prompt, Rendered)
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    with pytest.raises(ValueError, match=r"chats\.jsonl: line 1: message 2 \(assistant\) reads .* --train-on last"):
        completion(path, chat_tokenizer("qwen", QWEN3, IM), validation=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chat_template_kwargs": 5}, "chat_template_kwargs must map names of variables to values, got 5"),
        ({"tools": 7}, "tools must be a list of tools, got int"),
        ({"tools": "[]"}, "tools must be a list of tools, got str"),
    ],
)
def test_what_goes_to_the_template_is_checked(more, message):
    family = FAMILIES["chatml"]
    with pytest.raises(ValueError, match=message):
        conversation_of({"messages": MESSAGES, **more}, chat_tokenizer(family.kind, family.template, family.special))
