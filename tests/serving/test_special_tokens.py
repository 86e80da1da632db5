"""Endings, stop strings and messages that are special tokens, or that a chat template has its own way with."""

import threading
from contextlib import contextmanager

import pytest
import torch
from tokenizers import AddedToken

from tests.serving.tiny_server import posted
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chat_tokenizer, kind_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")
# which knows no other roles, and leaves them out
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Where?"}], "temperature": 0, "max_tokens": 9}
TEXT = {"model": "base", "prompt": "A:", "temperature": 0, "max_tokens": 9}


@contextmanager
def writing(tokenizer, answer, **limits):
    """A scope with the application of a base that writes the tokens of a text, and then the last of them again."""
    from lofit_fast.serving.adapter_switch import AdapterSwitch
    from lofit_fast.serving.web_app import Limits, web_app

    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = tiny_model("llama", vocab_size=len(tokenizer), **special)
    begun = []

    def write(_module, _args, options, out):
        given = options["input_ids"].shape[1]
        begun.append(given)
        at = len(begun) - 1 - max(i for i, length in enumerate(begun) if length > 1)
        out.logits = torch.full_like(out.logits, -10.0)
        out.logits[..., ids[min(at, len(ids) - 1)]] = 10.0
        return out

    model.register_forward_hook(write, with_kwargs=True)
    app = web_app(AdapterSwitch(model, "base", {}), tokenizer, Limits(**limits))
    try:
        yield app
    finally:
        app.state.answers.close()


def chatting():
    return chat_tokenizer("qwen", TEMPLATE, MARKS)


def choice(app, body, path="/v1/completions"):
    (response,) = posted(app, body, path=path)
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]
    return found.get("text", found.get("message", {}).get("content")), found["finish_reason"]


def test_a_turn_ends_as_the_template_ends_it():
    tokenizer = chatting()
    assert tokenizer.eos_token not in MARKS
    with writing(tokenizer, "Paris<|im_end|>\nuser again") as app:
        assert choice(app, CHAT, "/v1/chat/completions") == ("Paris", "stop")
        # a text that is continued has no turns
        assert choice(app, TEXT)[1] == "length"


def test_a_stop_string_may_be_a_special_token():
    with writing(chatting(), "Paris<|im_end|>\nuser again") as app:
        assert choice(app, {**TEXT, "stop": ["<|im_end|>"]}) == ("Paris", "stop")
        assert choice(app, {**TEXT, "stop": ["<|im_end|>", "r"]}) == ("Pa", "stop")
        (refused,) = posted(app, {**TEXT, "stop": ["x<|im_end|>"]})
        assert refused.status_code == 400
        assert "'x<|im_end|>' holds a special token" in refused.json()["error"]["message"]


def test_a_sign_that_the_tokenizer_does_not_know_names_no_token():
    tokenizer = chat_tokenizer("mistral_v01", TEMPLATE, MARKS)
    tokenizer.unk_token = "<|im_start|>"
    with writing(tokenizer, "Paris<|im_start|>\nuser again") as app:
        assert choice(app, {**TEXT, "stop": "<|im_start|>"}) == (" Paris", "stop")
        assert choice(app, {**TEXT, "stop": "\N{SNOWMAN}"})[1] == "length"


def test_a_special_token_need_not_be_one_that_the_tokenizer_names():
    tokenizer = chat_tokenizer("qwen", TEMPLATE.replace("<|im_end|>", "<|eot|>"), MARKS[:1])
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    with writing(tokenizer, "Paris<|eot|>\nuser again") as app:
        assert choice(app, CHAT, "/v1/chat/completions") == ("Paris", "stop")
        # as clients send it
        assert choice(app, {**TEXT, "stop": "<|eot|>\n"}) == ("Paris", "stop")


def test_what_a_template_takes_out_on_purpose_is_no_message_left_out():
    template = TEMPLATE.replace("m['content'] }}", "m['content'].replace('/no_think', '').split('</think>')[-1] }}")
    with writing(chat_tokenizer("qwen", template, MARKS), "Paris") as app:
        thought = {"role": "assistant", "content": "<think>\nhm\n</think>"}
        messages = [{"role": "user", "content": "Hm? /no_think"}, thought, *CHAT["messages"]]
        assert choice(app, {**CHAT, "messages": messages}, "/v1/chat/completions")[0].startswith("Paris")


def test_a_message_that_the_template_leaves_out_is_refused():
    with writing(chatting(), "Paris") as app:
        messages = [{"role": "developer", "content": "Answer in French."}, *CHAT["messages"]]
        (refused,) = posted(app, {**CHAT, "messages": messages}, path="/v1/chat/completions")
        assert refused.status_code == 400
        assert "message 1 (developer): the chat template leaves its content out" in refused.json()["error"]["message"]


def test_likelihoods_are_refused_however_few():
    with writing(chatting(), "Paris") as app:
        (refused,) = posted(app, {**TEXT, "logprobs": 0})
        assert refused.status_code == 400 and "logprobs: not supported here" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_space_before_an_answer_is_kept(stream):
    with writing(kind_tokenizer("llama2"), "yes") as app:
        (response,) = posted(app, {**TEXT, "max_tokens": 1, "stream": stream})
        assert '"text":" ' in response.text.replace('"text": "', '"text":"')


def test_who_has_gone_keeps_no_place_in_the_queue(monkeypatch):
    from lofit_fast.serving.answer_queue import Question, QueueFullError, Sampling

    busy = threading.Event()

    def asked():
        return Question("base", [1, 5], Sampling(2, temperature=0), lambda _: None)

    with writing(chatting(), "Paris", waiting=1) as app:
        answers = app.state.answers
        monkeypatch.setattr(answers.switch.model, "generate", lambda **_: busy.wait(60))
        gone = [asked() for _ in range(3)]
        answers.ask(asked())
        for question in gone:
            answers.ask(question)
            question.cancel()
        assert answers.pending == 1
        answers.ask(asked())
        with pytest.raises(QueueFullError, match="2 requests are waiting already"):
            answers.ask(asked())
        busy.set()
