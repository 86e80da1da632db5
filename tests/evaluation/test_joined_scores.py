"""Training, scoring, preferences and generation see the same tokens, whatever the tokenizer cuts where."""

import pytest
import torch

import lofit_fast as lf
import lofit_fast.evaluation.choices as scoring
import lofit_fast.evaluation.judge as judging
from lofit_fast.data.encode import IGNORED, BoundaryWarning, encode
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.tasks import Example, Task
from lofit_fast.tasks.chat import conversation
from tests.chat_templates import FAMILIES, GPT_OSS, QWEN3
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import KINDS, chat_tokenizer, kind_tokenizer

QUESTIONS = ["A:", "who wrote it?"]
CHOICES = [[" x", " yes", " 12"], [" the man", " the"]]
# "1" leaves the space alone, "yes" takes it along
SPACED, ANSWERS = "Q: is it so? A: ", ("yes", "1")
IM = ("<|im_start|>", "<|im_end|>")


def data_set(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", torch.float64, vocab_size=800)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


@torch.no_grad()
def log_p(model, ids, start):
    """log p of ids[start:], after those before."""
    rows = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(rows[i - 1, ids[i]].item() for i in range(start, len(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_of_the_joined_tokens(model, kind):
    tokenizer = kind_tokenizer(kind)
    scores = score_choices(model, tokenizer, QUESTIONS, CHOICES)
    ends = score_choices(model, tokenizer, QUESTIONS, CHOICES, end=True)
    for question, choices, row, ended in zip(QUESTIONS, CHOICES, scores, ends, strict=True):
        start = len(tokenizer(question)["input_ids"])
        for choice, score, whole in zip(choices, row, ended, strict=True):
            joined = tokenizer(question + choice)["input_ids"]
            assert score.item() == pytest.approx(log_p(model, joined, start), rel=1e-6)
            # what training learns is what scoring scores
            learned = encode(tokenizer, Example(question, choice), None)
            assert learned["labels"].count(IGNORED) == start
            assert whole.item() == pytest.approx(log_p(model, learned["input_ids"], start), rel=1e-6)


@pytest.mark.parametrize("way", ["packed", "by question", "singly"])
def test_a_choice_that_changes_its_prompt_is_scored_from_before_the_change(model, monkeypatch, way):
    tokenizer = kind_tokenizer("qwen")
    if way == "singly":
        monkeypatch.setattr(scoring, "packing_refusal", lambda model: "of a test")
    monkeypatch.setattr(model.model.norm, "depends_on_prompt", way == "by question", raising=False)
    shared = len(tokenizer(SPACED.rstrip())["input_ids"])
    with pytest.warns(BoundaryWarning, match="in 1 of 2 examples"):
        scores, plain = score_choices(model, tokenizer, [SPACED, "A:"], [ANSWERS, [" x"]])
    for answer, score in zip(ANSWERS, scores, strict=True):
        assert score.item() == pytest.approx(log_p(model, tokenizer(SPACED + answer)["input_ids"], shared), rel=1e-6)
    assert plain.item() == pytest.approx(log_p(model, tokenizer("A: x")["input_ids"], 2), rel=1e-6)


@pytest.mark.parametrize("kind", ["qwen", "llama2_legacy", "tekken"])
def test_preferences_are_of_the_joined_tokens(model, kind):
    tokenizer = kind_tokenizer(kind)
    rows = {"prompt": [SPACED.rstrip(), SPACED], "chosen": [" yes", "yes"], "rejected": [" 1", "1"]}
    given, handle = data_set(rows), lf.patch(model, lf.LofitConfig(offset=[(0, 1)]))
    with pytest.warns(BoundaryWarning, match="in 1 of 2"):
        done = lf.reference_logprobs(handle, given, tokenizer)
    handle.unpatch()
    for row in done:
        for side in ("chosen", "rejected"):
            joined = row["prompt_ids"] + row[f"{side}_ids"]
            assert joined == [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            expected = log_p(model, joined, len(row["prompt_ids"]))
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, rel=1e-6)
    # a space before the answer or at the end of the prompt makes no difference
    assert done["ref_chosen_logps"][0] == pytest.approx(done["ref_chosen_logps"][1], rel=1e-9)


def test_a_rendered_prompt_stays_so_among_preferences(model):
    tokenizer = kind_tokenizer("llama3")
    rows = {"prompt": ["A:", "A:"], "chosen": [" yes"] * 2, "rejected": [" x"] * 2, "prompt_rendered": [True, False]}
    given, handle = data_set(rows), lf.patch(model, lf.LofitConfig(offset=[(0, 1)]))
    done = lf.reference_logprobs(handle, given, tokenizer)
    handle.unpatch()
    plain = tokenizer("A:", add_special_tokens=False)["input_ids"]
    assert done["prompt_ids"] == [plain, [tokenizer.bos_token_id, *plain]]


def test_a_prefix_that_is_rendered_text_stays_so(model):
    family = FAMILIES["glm"]
    tokenizer = chat_tokenizer("qwen", family.template, family.special, family.preamble)
    talk = conversation([{"role": "user", "content": "x?"}, {"role": "assistant", "content": " y"}], tokenizer)
    (scores,) = score_choices(model, tokenizer, [talk.prompt], [[" y"]])
    joined = tokenizer(talk.prompt + " y", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(talk.prompt, add_special_tokens=False)["input_ids"])
    assert scores.item() == pytest.approx(log_p(model, joined, start), rel=1e-6)


CHATS = {
    "chatml": (FAMILIES["chatml"].template, IM, "Four.<|im_end|>", "Five.<|im_end|>\n<|im_start|>user\nFour."),
    "qwen3": (QWEN3, IM, "<think>\nit is so\n</think>\n\nFour.<|im_end|>", "<think>\nFour.\n</think>\n\nNo.<|im_end|>"),
    "gpt-oss": (
        GPT_OSS,
        FAMILIES["gpt-oss"].special,
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        "<|channel|>analysis<|message|>Four.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_judged_by_the_content_of_its_last_turn(model, monkeypatch, name):
    template, special, right, wrong = CHATS[name]
    tokenizer = chat_tokenizer("qwen", template, special)
    talk = conversation([{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Four."}], tokenizer)
    asked = []

    def generate(input_ids, attention_mask, generation_config, **_):
        asked.append((input_ids, generation_config))
        answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (right, wrong)]
        longest = max(map(len, answers))
        rows = [answer + [tokenizer.pad_token_id] * (longest - len(answer)) for answer in answers]
        return torch.cat((input_ids, torch.tensor(rows)), 1)

    monkeypatch.setattr(model, "generate", generate)
    assert judging.judge(model, tokenizer, Task("chats", [], [talk, talk])).hits == [1.0, 0.0]
    # after a trial of the model
    ids, config = asked[-1]
    # the template's ending ends an answer, whatever the model's config says
    assert tokenizer.convert_tokens_to_ids(talk.ending) in config.eos_token_id
    assert ids[0].tolist() == tokenizer(talk.prompt, add_special_tokens=False)["input_ids"]
    # a plain example beside it is judged as it was
    assert judging._said(tokenizer, Example("a", " b"), tokenizer(" b<|im_end|>")["input_ids"]).startswith(" b")
