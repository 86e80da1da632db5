"""A model that writes exactly what was learned is right, whatever a tokenizer makes of the answer."""

import unicodedata

import pytest
import torch
from torch.nn.functional import normalize

from lofit_fast.data.encode import IGNORED, BoundaryWarning, encode
from lofit_fast.evaluation.judge import generate_answers, judge
from lofit_fast.tasks.chat import conversation
from lofit_fast.tasks.task import Example, Task
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chat_tokenizer, kind_tokenizer, tiny_tokenizer

NFD = unicodedata.normalize("NFD", " caf\N{LATIN SMALL LETTER E WITH ACUTE}")


def chain(tokenizer, ids):
    """A Llama whose layers do nothing, and which writes the next of some distinct ids after each of them."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=512, intermediate_size=8, **special)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = normalize(torch.randn(len(tokenizer), 512, generator=torch.Generator().manual_seed(0)), dim=1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.zero_()
        for before, after in zip(ids, ids[1:], strict=False):
            model.lm_head.weight[after] += directions[before]
    return model


def learned(tokenizer, example):
    """(a model that writes what is learned of an example, the ids from the prompt's last one on)"""
    row = encode(tokenizer, example, None)
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    ids = row["input_ids"][start - 1 :]
    assert len(set(ids)) == len(ids)
    return chain(tokenizer, ids)


def with_special(*tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]})
    return tokenizer


def cleaning_up():
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "right", "wrong"),
    [
        (tiny_tokenizer, " Paris</s>", " Prague"),
        (lambda: with_special("<yes>", "<no>"), " <yes>", " <no>"),
        (lambda: with_special("<end>"), " Paris<end>", " Prague<end>"),
        (lambda: kind_tokenizer("qwen"), NFD, " cafe"),
        (cleaning_up, "x ,y", "x y"),
    ],
    ids=["an end of its own", "a label", "another special token", "accents of their own", "spaces"],
)
def test_what_was_learned_is_right(tokenizer, right, wrong):
    tokenizer = tokenizer()
    example = Example("Q:", right)
    model = learned(tokenizer, example)
    assert judge(model, tokenizer, Task("t", [], [example])).metrics == {"exact_match": 1.0}
    assert judge(model, tokenizer, Task("t", [], [Example("Q:", wrong)])).metrics == {"exact_match": 0.0}


def test_two_unknown_answers_are_not_the_same():
    tokenizer = tiny_tokenizer()
    model = learned(tokenizer, Example("Q:", "\N{SNOWMAN}"))
    assert judge(model, tokenizer, Task("t", [], [Example("Q:", "\N{UMBRELLA}")])).metrics == {"exact_match": 0.0}


def test_a_call_of_a_tool_is_right():
    tokenizer = with_special("<call>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
        "{% if message.tool_calls %}<call>{{ message.tool_calls[0]['function']['name'] }}{% endif %}"
        "{{ message['content'] or '' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def talk(name):
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name}}]}
        return conversation([{"role": "user", "content": "hi"}, call], tokenizer)

    model = learned(tokenizer, talk("abc"))
    assert judge(model, tokenizer, Task("t", [], [talk("abc")])).metrics == {"exact_match": 1.0}
    assert judge(model, tokenizer, Task("t", [], [talk("abd")])).metrics == {"exact_match": 0.0}


THOUGHT = "<think>\nwho\n</think>\n\nParis"
SPLITTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}"
    "{% if '</think>' in c %}<think>\n{{ c.split('</think>')[0].replace('<think>', '').strip() }}\n</think>\n\n"
    "{{ c.split('</think>')[-1].strip() }}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [SPLITTING, PLAIN], ids=["a template that knows thinking", "one that does not"])
def test_an_answer_is_judged_without_the_thinking_in_its_content(template):
    tokenizer = chat_tokenizer("qwen", template, ["<|im_start|>", "<|im_end|>"])
    talk = conversation([{"role": "user", "content": "Where?"}, {"role": "assistant", "content": THOUGHT}], tokenizer)
    assert "Paris" in talk.answers
    assert talk.said("<think>\nsomebody else\n</think>\n\nParis<|im_end|>").strip() == "Paris"
    # what is learned is all of it
    assert talk.completion == THOUGHT


def test_a_prompt_that_is_continued_from_other_tokens_is_said():
    tokenizer, example = kind_tokenizer("gpt2"), Example("A: ", "yes")
    with pytest.warns(BoundaryWarning, match="in 1 of 1 examples the tokens at the end of the prompt change"):
        judge(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, Task("t", [], [example]))


@pytest.mark.parametrize("name", ["llama2"])
def test_an_answer_reads_as_it_does_behind_its_prompt(name):
    tokenizer = kind_tokenizer(name)
    model = learned(tokenizer, Example("A:", " yes"))
    assert generate_answers(model, tokenizer, ["A:"]) == [" yes"]
