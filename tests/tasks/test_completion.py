import json
import sys
import types

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.completion import completion

PAIRS = [{"prompt": f"Count to {i}.\n", "completion": f"  {i}\u2028!"} for i in range(20)]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "content": "Four."},
    ]
}


class ChatTokenizer:
    chat_template = "stub"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        if any(message["role"] == "tool" for message in messages):
            raise RuntimeError("no tools here")
        return (
            "".join(f"<{message['role']}>{message['content']}" for message in messages)
            + "<assistant>" * add_generation_prompt
        )


class PlainTokenizer(ChatTokenizer):
    chat_template = None


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(examples):
    return [{"prompt": example.prompt, "completion": example.completion} for example in examples]


def test_completion_takes_strings_as_they_are(tmp_path):
    task = completion(lines(tmp_path / "a.jsonl", PAIRS), validation=0)
    assert (task.name, task.validation, task.candidates) == ("completion", [], ())
    assert pairs(task.train) == PAIRS
    assert task.train[3].answers == ("3\u2028!",)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_completion_reads_an_array_lines_blank_lines_and_a_byte_order_mark(tmp_path, suffix):
    array, rows = tmp_path / f"array{suffix}", tmp_path / f"lines{suffix}"
    array.write_text(json.dumps(PAIRS, indent=1), encoding="utf-8-sig")
    rows.write_text("\ufeff\n" + "\r\n\n".join(json.dumps(row) for row in PAIRS), encoding="utf-8")
    for path in (array, rows):
        assert pairs(completion(str(path), validation=0).train) == PAIRS


def test_completion_sets_a_share_aside(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS)
    task = completion(path)
    assert (len(task.train), len(task.validation)) == (18, 2)
    # nothing is lost, nothing is in both, and the order of the file is kept
    train, held_out = pairs(task.train), pairs(task.validation)
    assert train == [row for row in PAIRS if row not in held_out]
    assert held_out == [row for row in PAIRS if row in held_out]
    assert completion(path) == task != completion(path, seed=1)
    assert len(completion(path, validation=0.001).validation) == 1
    assert len(completion(path, validation=0.5).validation) == 10


def test_completion_train_size_leaves_validation_alone(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS)
    whole, five, nine = completion(path), completion(path, train_size=5), completion(path, train_size=9)
    assert five.validation == whole.validation and len(five.train) == 5
    assert all(example in nine.train for example in five.train) and all(
        example in whole.train for example in nine.train
    )
    for size in (0, 19):
        with pytest.raises(ValueError, match=rf"a\.jsonl: got train_size={size}, expected 1 to the 18 training rows"):
            completion(path, train_size=size)


def test_completion_validation_from_a_second_file(tmp_path):
    train, held_out = lines(tmp_path / "a.jsonl", PAIRS[:15]), lines(tmp_path / "b.jsonl", PAIRS[15:])
    for validation in (held_out, str(held_out)):
        task = completion(train, validation=validation)
        assert (pairs(task.train), pairs(task.validation)) == (PAIRS[:15], PAIRS[15:])
    assert load_task("completion", data=train, validation=held_out) == task


def test_completion_chat_goes_through_the_template(tmp_path):
    path = lines(tmp_path / "chat.jsonl", [CHAT, PAIRS[0]])
    task = load_task("completion", data=path, tokenizer=ChatTokenizer(), validation=0)
    assert task.train[0].prompt == "<system>Be brief.<user>Two plus two?<assistant>"
    assert (task.train[0].completion, task.train[0].answers) == ("Four.", ("Four.",))
    assert pairs(task.train[1:]) == PAIRS[:1]


def chat(*messages):
    return {"messages": [dict(zip(("role", "content"), message, strict=True)) for message in messages]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"got the keys \['prompt'\], expected the keys prompt and completion, or messages"),
        ({"text": "x"}, r"got the keys \['text'\]"),
        (["x"], "got list, expected the keys"),
        ({"prompt": None, "completion": "x"}, "prompt must be a string, got NoneType"),
        ({"prompt": "x", "completion": 4}, "completion must be a string, got int"),
        ({"prompt": "x", "completion": " \n"}, "completion must hold some text"),
        ({"messages": "hello"}, "messages must be a list of two or more, got 'hello'"),
        (chat(("assistant", "x")), "messages must be a list of two or more"),
        (chat(("user", "x"), ("user", "y")), "the last message must be from the assistant, got 'user'"),
        (chat(("user", ["x"]), ("assistant", "y")), "every message must hold the texts role and content"),
        (chat(("user", "x"), ("assistant", " ")), "completion must hold some text"),
        (chat(("tool", "x"), ("assistant", "y")), "the chat template refused the messages: no tools here"),
    ],
)
def test_completion_names_file_and_line_of_a_bad_row(tmp_path, row, message):
    path = lines(tmp_path / "a.jsonl", [PAIRS[0], row])
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: {message}"):
        completion(path, tokenizer=ChatTokenizer())
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIRS[0], row]))
    with pytest.raises(ValueError, match=rf"a\.json: row 2: {message}"):
        completion(path, tokenizer=ChatTokenizer())


@pytest.mark.parametrize(("tokenizer", "got"), [(None, "no tokenizer"), (PlainTokenizer(), "one without")])
def test_completion_messages_need_a_template(tmp_path, tokenizer, got):
    path = lines(tmp_path / "chat.jsonl", [CHAT])
    with pytest.raises(ValueError, match=rf"chat\.jsonl: line 1: messages need .* chat template, got {got}"):
        completion(path, tokenizer=tokenizer)


def test_completion_rejects_what_is_not_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n\n{'prompt': 'x'}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 3, column 2: expected JSON"):
        completion(path)
    path.write_text('[\n{"prompt": "x",\n "completion": y}]')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 3, column 16: expected JSON"):
        completion(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.jsonl: expected UTF-8 text"):
        completion(path)
    for empty in ("", " \n\n", "[]"):
        path.write_text(empty)
        with pytest.raises(ValueError, match=r"a\.jsonl: got no rows"):
            completion(path)


def test_completion_rejects_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file, expected one of type \.jsonl, \.json"):
        completion(str(tmp_path / "missing.jsonl"))
    with pytest.raises(
        FileNotFoundError, match="alone: no such file or folder, and not a data set id such as owner/na"
    ):
        completion("alone")
    (tmp_path / "a.xlsx").write_text("prompt,completion")
    with pytest.raises(ValueError, match=r"got a file of type \.xlsx, expected one of type \.jsonl, \.json, \.csv"):
        completion(tmp_path / "a.xlsx")
    with pytest.raises(TypeError, match="data must be a path or a data set id, got list"):
        completion([])


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (1, ValueError, "got a share of 1, expected 0 <= share < 1"),
        (-0.1, ValueError, "got a share of -0.1"),
        (0.99, ValueError, "a share of 0.99 leaves none of 20 rows to train on"),
        (True, TypeError, "validation must be a path, a data set id or a share, got bool"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_completion_rejects_shares(tmp_path, share, error, message):
    with pytest.raises(error, match=message):
        completion(lines(tmp_path / "a.jsonl", PAIRS), validation=share)


def test_completion_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return PAIRS if split == "train" else [{"prompt": "x"}]

    # stands in for the library: what is asked of the hub is checked, not the hub
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(completion("owner/some.name").train) == 18
    with pytest.raises(ValueError, match=r"owner/some\.name:test\[:5\]: row 1: got the keys"):
        completion("owner/some.name", validation="owner/some.name:test[:5]")
    assert asked == [("owner/some.name", "train")] * 2 + [("owner/some.name", "test[:5]")]
