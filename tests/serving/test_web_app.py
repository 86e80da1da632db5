"""The server's answers are the model's own, adapter by adapter; bad requests are refused and lose nobody else's."""

import asyncio
import json
import math
import time

import pytest
import torch

import lofit_fast as lf
from lofit_fast.evaluation.judge import generate_answers
from tests.serving.tiny_server import CONFIGS, adapter_folders, events_of, got, posted, running
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

PROMPT = "hello there"
ASK = {"model": "base", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
NAMES = ("base", *CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return adapter_folders(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def app(folders):
    with running(folders) as (app, _):
        yield app


def expected(folders, name, prompt=PROMPT, tokens=6):
    model = tiny_model("llama")
    if name != "base":
        lf.load(model, folders[name])
    return generate_answers(model, tiny_tokenizer(), [prompt], max_new_tokens=tokens)[0]


def text_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def refusal(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_each_adapter_answers_as_it_does_by_itself(app, folders):
    answers = {name: expected(folders, name, tokens=4) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)
    # there and back, all asked at once
    order = [*NAMES, *NAMES[-2::-1]]
    responses = posted(app, *({**ASK, "model": name, "max_tokens": 4} for name in order))
    assert [text_of(response) for response in responses] == [answers[name] for name in order]
    assert [response.json()["model"] for response in responses] == order
    usage = responses[0].json()["usage"]
    assert usage == {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16}


def test_models_and_health(app):
    listed = got(app, "/v1/models").json()
    assert [(row["id"], row["parent"]) for row in listed["data"]] == [
        (name, None if name == "base" else "base") for name in NAMES
    ]
    assert got(app, "/v1/models/moved").json()["root"] == "base"
    assert refusal(got(app, "/v1/models/other"), 404)["code"] == "model_not_found"
    assert got(app, "/health").json() == {"status": "ok", "pending": 0, "chat": True}


def test_chat_is_the_template_and_the_prompt(app, folders):
    (response,) = posted(app, {**CHAT, "model": "moved"}, path="/v1/chat/completions")
    body = response.json()
    assert (body["object"], body["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    # the template has the beginning token itself
    assert text_of(response) == expected(folders, "moved", "<s>[user]hi[assistant]".removeprefix("<s>"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    (again,) = posted(app, {**CHAT, "model": "moved", "messages": parts}, path="/v1/chat/completions")
    assert text_of(again) == text_of(response)


@pytest.mark.parametrize("path, body", [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
def test_a_stream_says_what_the_whole_answer_says(app, path, body):
    whole, streamed = posted(app, body, {**body, "stream": True, "stream_options": {"include_usage": True}}, path=path)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *events, usage = events_of(streamed)
    assert usage["choices"] == [] and usage["usage"] == whole.json()["usage"]
    choices = [event["choices"][0] for event in events]
    said = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]
    assert "".join(said) == text_of(whole)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    # token by token, and one name for all of them
    assert len(events) > 3 and len({event["id"] for event in events}) == 1


def test_what_the_model_was_published_with_changes_no_answer(folders):
    with running({}) as (app, switch):
        published = switch.model.generation_config
        published.update(suppress_tokens=list(range(3, 40)), repetition_penalty=9.0, max_time=0.0)
        before = published.to_dict()
        assert text_of(*posted(app, ASK)) == expected(folders, "base")
        assert switch.model.generation_config is published and published.to_dict() == before


def test_stop_seed_and_temperature(app, folders):
    answer = expected(folders, "base")
    (stopped,) = posted(app, {**ASK, "stop": [answer[3:5]]})
    choice = stopped.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (answer[: answer.index(answer[3:5])], "stop")
    drawn = {**ASK, "temperature": 1.5, "max_tokens": 12}
    same, again, other = posted(app, {**drawn, "seed": 1}, {**drawn, "seed": 1}, {**drawn, "seed": 2})
    assert text_of(same) == text_of(again) != text_of(other)
    first, second = posted(app, drawn, drawn)
    assert text_of(first) != text_of(second)
    # of the likeliest tokens alone, next to nothing is drawn
    (narrow,) = posted(app, {**ASK, "temperature": 0.01, "top_p": 0.01, "seed": 5})
    assert text_of(narrow) == answer


# what is wrong -> the parameter that is named, and a word of the reason
BAD = {
    "no model": ({"model": ...}, "model", "Field required"),
    "another type": ({"prompt": 3}, "prompt", "got 3"),
    "two prompts": ({"prompt": ["a", "b"]}, "prompt", "at most 1"),
    "text for a number": ({"temperature": "hot"}, "temperature", "got 'hot'"),
    "true for a number": ({"max_tokens": True}, "max_tokens", "got True"),
    "a fraction of a token": ({"max_tokens": 2.5}, "max_tokens", "got 2.5"),
    "too hot": ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    "hardly warm": ({"temperature": 1e-9}, "temperature", "at least 0.01"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "no top_p": ({"top_p": 0, "temperature": 1}, "top_p", "greater than 0"),
    "an idle top_p": ({"top_p": 0.5}, None, "top_p does nothing with temperature 0"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported here"),
    "two answers": ({"n": 2}, "n", "not supported here"),
    "yes for one": ({"n": True}, "n", "not supported here"),
    "somebody's own": ({"top_k": 5}, "top_k", "not supported here"),
    "an empty stop": ({"stop": ""}, "stop", "1 to 1000 characters"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, None, "for stream=true"),
    "too long": ({"prompt": "x" * 70}, "prompt", "do not fit the model's context of 64"),
    "too much": ({"max_tokens": 60}, "prompt", "do not fit the model's context of 64"),
    "half a character": ({"prompt": "\ud83d"}, "prompt", "half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_named(app, name):
    changes, param, reason = BAD[name]
    body = {key: value for key, value in {**ASK, **changes}.items() if value is not ...}
    error = refusal(*posted(app, body), 400)
    assert error["param"] == param and reason in error["message"], error
    assert error["type"] == "invalid_request_error"


BAD_CHATS = {
    "no messages": ([], "at least 1 item"),
    "no list": ("hi", "got 'hi'"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "got 'image_url'"),
    "nobody": ([{"role": "stranger", "content": "a"}], "got 'stranger'"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_chat_is_named(app, name):
    messages, reason = BAD_CHATS[name]
    error = refusal(*posted(app, {**CHAT, "messages": messages}, path="/v1/chat/completions"), 400)
    assert error["param"].startswith("messages") and reason in error["message"], error


def test_a_request_that_says_two_things_is_refused(app):
    body = json.dumps({**ASK, "model": "moved"})[:-1] + ', "model": "base"}'
    assert "'model' is there twice" in refusal(*posted(app, body.encode()), 400)["message"]


def test_logits_that_are_not_finite_are_no_answer(folders, capsys):
    with running({}) as (app, switch):
        weight = switch.model.lm_head.weight
        with torch.no_grad():
            before = weight[5].clone()
            weight[5] = math.nan
        for temperature in (0, 1):
            (response,) = posted(app, {**ASK, "temperature": temperature})
            assert "logits are not finite" in refusal(response, 500)["message"]
        with torch.no_grad():
            weight[5] = before
        text_of(*posted(app, ASK))


def test_what_is_no_request(app):
    for body in (b"", b"{", b"[" * 10**5, b"\xff", b"[]", b"3", b'{"model": NaN}'):
        refusal(*posted(app, body), 400)
    assert "more than 1048576 bytes" in refusal(*posted(app, b" " * 2**21), 413)["message"]
    assert "Content-Type" in refusal(*posted(app, ASK, headers={"Content-Type": "text/plain"}), 415)["message"]
    error = refusal(*posted(app, {**ASK, "model": "gpt-9"}), 404)
    assert (
        error["code"] == "model_not_found"
        and "expected one of base, moved, further, scaled, answers" in error["message"]
    )
    refusal(*posted(app, ASK, path="/v1/embeddings"), 404)
    assert refusal(got(app, "/v1/completions"), 405)
    # a name that somebody's page has led here
    assert got(app, "/v1/models", host="evil.example").status_code == 400
    # what changes nothing is let through, and the server is well
    neutral = {"n": 1, "frequency_penalty": 0.0, "logprobs": None, "stop": None, "logit_bias": {}, "echo": False}
    assert text_of(*posted(app, {**ASK, **neutral}))


def test_a_hundred_clients_at_once(app, folders):
    names = ("base", "moved")
    answers = {name: expected(folders, name, tokens=1) for name in names}
    bodies = [{**ASK, "max_tokens": 1, "model": names[i // 50]} for i in range(100)]
    # every other one is wrong, in one of these ways
    wrong = [({**ASK, "model": "none"}, 404), ({**ASK, "prompt": "x" * 70}, 400), (b"{", 400), (b" " * 2**21, 413)]
    bodies[::2] = [wrong[i % len(wrong)][0] for i in range(50)]
    responses = posted(app, *bodies)
    for i, (body, response) in enumerate(zip(bodies, responses, strict=True)):
        if i % 2:
            assert text_of(response) == answers[body["model"]]
        else:
            refusal(response, wrong[i // 2 % len(wrong)][1])
    assert got(app, "/health").json()["pending"] == 0


def test_more_than_may_wait_are_told_so(folders):
    with running({}, waiting=3) as (app, _):
        responses = posted(app, *[ASK] * 12)
        answered = [response for response in responses if response.status_code == 200]
        # one is being answered beside those that wait
        assert len(answered) >= 4
        for response in responses:
            if response.status_code != 200:
                error = refusal(response, 503)
                assert "and 3 may: try again" in error["message"] and response.headers["retry-after"] == "1"
        assert len(answered) < 12
        assert text_of(*posted(app, ASK)) == text_of(answered[0])


def test_an_error_ends_one_answer_alone(folders, monkeypatch, capsys):
    with running({"moved": folders["moved"]}) as (app, switch):
        real, calls = switch.model.generate, []

        def failing(**options):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no memory left\nand more")
            return real(**options)

        monkeypatch.setattr(switch.model, "generate", failing)
        first, second, third = posted(app, ASK, {**ASK, "model": "moved"}, {**ASK, "model": "moved"})
        assert text_of(first) == expected(folders, "base")
        assert refusal(second, 500)["message"] == "RuntimeError: no memory left"
        assert text_of(third) == expected(folders, "moved")
    assert "no memory left" in capsys.readouterr().err


def test_nobody_is_answered_who_has_gone(folders):
    from lofit_fast.serving.answer_queue import ClosedError, Question, Sampling

    with running({}) as (app, _):
        answers, told = app.state.answers, []

        def tell(piece):
            told.append(piece)
            # goes away after the first word
            question.cancel()

        question = Question("base", [1, 5, 6], Sampling(60, temperature=0), tell)
        answers.ask(question)
        deadline = time.monotonic() + 30
        while answers.pending and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 1 <= told[-1].tokens < 5
    with pytest.raises(ClosedError):
        answers.ask(question)


def test_nobody_is_answered_who_has_gone_however_fast_the_pieces_come(monkeypatch):
    with running({}) as (app, switch):
        pieces = []

        def fast(input_ids, streamer, stopping_criteria, **_):
            streamer.put(input_ids)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not any(over(input_ids, None).all() for over in stopping_criteria):
                pieces.append(5)
                streamer.put(torch.tensor([5]))
                time.sleep(0.001)

        monkeypatch.setattr(switch.model, "generate", fast)
        began = time.monotonic()
        assert asyncio.run(left_at_once(app, ASK)) == 499
        while app.state.answers.pending and time.monotonic() < began + 30:
            time.sleep(0.01)
        assert len(pieces) > 50 and time.monotonic() - began < 10


async def left_at_once(app, body):
    """The status of the response to a client that sends its request and goes."""
    events = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
    path = {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    sent = []

    async def receive():
        return events.pop() if events else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    client = {"scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "http_version": "1.1"}
    await app({"type": "http", "method": "POST", "headers": headers, **path, **client}, receive, send)
    return sent[0]["status"]


def test_a_question_that_comes_as_the_server_ends_is_told_so():
    from lofit_fast.serving.answer_queue import ClosedError, Question, Sampling

    class EndsFirst:
        """A queue whose reader is told to end, and given the time to, right before a question is put in."""

        def __init__(self, answers):
            self.answers, self.real = answers, answers._waiting

        def put(self, question):
            if question is not None:
                self.answers.stop()
                self.answers._thread.join(0.5)
            self.real.put(question)

        def __getattr__(self, name):
            return getattr(self.real, name)

    with running({}) as (app, _):
        answers, told = app.state.answers, []
        answers._waiting = EndsFirst(answers)
        answers.ask(Question("base", [1, 5], Sampling(2, temperature=0), told.append))
        answers.close()
        assert [(piece.finish, piece.error) for piece in told] == [("error", "the server is shutting down")]
        assert answers.pending == 0
        with pytest.raises(ClosedError, match="shutting down"):
            answers.ask(Question("base", [1, 5], Sampling(2, temperature=0), told.append))


def test_one_who_cannot_be_told_ends_one_answer_alone(monkeypatch, capsys):
    from lofit_fast.serving.answer_queue import Question, Sampling

    with running({}) as (app, switch):
        answers, real = app.state.answers, switch.model.generate

        def no_ear(piece):
            raise OSError("nobody is there")

        answers.ask(Question("base", [1, 5], Sampling(2, temperature=0), no_ear))
        text_of(*posted(app, ASK))

        def ends(**options):
            raise SystemExit("no way on")

        monkeypatch.setattr(switch.model, "generate", ends)
        assert refusal(*posted(app, ASK), 500)["message"] == "SystemExit: no way on"
        monkeypatch.setattr(switch.model, "generate", real)
        text_of(*posted(app, ASK))
    assert "nobody is there" in capsys.readouterr().err


def test_without_a_chat_template(folders):
    with running({}, chat=False) as (app, _):
        assert got(app, "/health").json()["chat"] is False
        error = refusal(*posted(app, CHAT, path="/v1/chat/completions"), 400)
        assert "no chat template: use /v1/completions" in error["message"]


def test_the_page_asks_nobody_else(app):
    page = got(app, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/chat.js", "/chat.css"):
        text = got(app, path).text
        assert "://" not in text and "innerHTML" not in text
    assert json.loads(got(app, "/v1/models").text)["object"] == "list"


def test_adapters_that_cannot_be_served(folders, tmp_path):
    from lofit_fast.serving.adapter_switch import AdapterSwitch

    for adapters, error, match in (
        ({"base": folders["moved"]}, ValueError, "an adapter is called 'base' as the base is"),
        ({"a b": folders["moved"]}, ValueError, "expected the name of a model"),
        ({"none": tmp_path / "none"}, FileNotFoundError, "is no adapter folder"),
    ):
        with pytest.raises(error, match=match):
            AdapterSwitch(tiny_model("llama"), "base", adapters)
    with pytest.raises(ValueError, match="was trained on other weights"):
        AdapterSwitch(tiny_model("llama", seed=4), "base", folders, strict=True)
