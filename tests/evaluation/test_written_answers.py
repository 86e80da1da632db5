"""A model that writes exactly what was learned is right, whatever a tokenizer makes of the answer."""

import unicodedata

import pytest
import torch
from torch.nn.functional import normalize

from lofit_fast.data.decode import continuation
from lofit_fast.data.encode import IGNORED, BoundaryWarning, encode
from lofit_fast.evaluation.judge import generate_answers, judge
from lofit_fast.serving.token_text import TokenText
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


def test_an_answer_that_the_tokenizer_loses_a_part_of_is_not_right_by_the_rest():
    tokenizer = kind_tokenizer("llama2")
    model = learned(tokenizer, Example("Q:", " yes"))
    for answer in (" yes</s>no", " yes\N{SNOWMAN}"):
        assert judge(model, tokenizer, Task("t", [], [Example("Q:", answer)])).metrics == {"exact_match": 0.0}


def test_an_end_that_is_the_unknown_token_too_is_an_end():
    tokenizer = with_special("<stop>")
    tokenizer.unk_token = "<stop>"
    example = Example("Q:", " Paris<stop>")
    model = learned(tokenizer, example)
    assert judge(model, tokenizer, Task("t", [], [example])).metrics == {"exact_match": 1.0}


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


OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_what_is_no_thinking_is_judged_as_it_is():
    tokenizer = chat_tokenizer("qwen", PLAIN, ["<|im_start|>", "<|im_end|>"])
    for content in ("<r><verdict>no</verdict><reason>because</reason></r>", "Use </think> to close it"):
        talk = conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": content}], tokenizer)
        assert talk.answers == (content,) and talk.marker == ""
    # the template has opened it
    opened = chat_tokenizer("qwen", OPENING, ["<|im_start|>", "<|im_end|>"])
    talk = conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "so</think>Paris"}], opened)
    assert "Paris" in talk.answers and talk.said("who</think>Paris<|im_end|>") == "Paris"


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


@pytest.mark.parametrize("name", ["llama2_legacy", "mistral_v01", "llama2", "gemma", "gpt2"])
@pytest.mark.parametrize("prompt", ["\u5317\u6d77\u9053\u672d\u5e4c", "a\U0001f600\U0001f601\U0001f602\U0001f603 b:"])
def test_rare_characters_are_whole_behind_others(name, prompt):
    """Each is several tokens, of which a window of a few may show a part."""
    tokenizer = kind_tokenizer(name)
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + "\u9999!"))
    ids = ids[len(before) :]
    assert continuation(tokenizer, before, ids) == "\u9999!"
    text = TokenText(tokenizer, (), before)
    assert "".join([*map(text.add, ids), text.rest()]) == "\u9999!"


@pytest.mark.parametrize("name", ["llama2"])
def test_an_answer_reads_as_it_does_behind_its_prompt(name):
    tokenizer = kind_tokenizer(name)
    model = learned(tokenizer, Example("A:", " yes"))
    assert generate_answers(model, tokenizer, ["A:"]) == [" yes"]
