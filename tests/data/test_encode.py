"""From text to token ids: what carries a label, what is joined how, and what is refused."""

import pytest
from tokenizers import normalizers

from lofit_fast.data.encode import IGNORED, BoundaryWarning, encode, encode_all, encode_prompt
from lofit_fast.tasks import Example
from tests.tiny_tokenizers import BOS, VOCABULARY, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def ids(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


@pytest.mark.parametrize("bos", [True, False])
def test_labels_are_the_completion_and_its_end(bos):
    encoded = encode(tiny_tokenizer(bos=bos), Example("ab=", "cd"), None)
    prompt = [1] * bos + ids("ab=")
    assert encoded == {"input_ids": [*prompt, *ids("cd"), 2], "labels": [IGNORED] * len(prompt) + [*ids("cd"), 2]}


def test_a_mapping_is_an_example():
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, {"prompt": "a", "completion": "b"}, None) == encode(tokenizer, Example("a", "b"), None)


def test_a_token_of_prompt_and_completion_is_learned_and_said():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_tokens(["ab"])
    x, both = tokenizer("xab")["input_ids"]
    with pytest.warns(BoundaryWarning, match="in 1 of 1 examples .* 'xa' goes on 'a' alone and 'ab' before 'b'"):
        encoded = encode(tokenizer, Example("xa", "b"), None)
    assert encoded == {"input_ids": [x, both, 2], "labels": [IGNORED, both, 2]}


def test_special_tokens_come_once():
    assert encode_prompt(tiny_tokenizer(), "ab") == [1, *ids("ab")]
    assert encode_prompt(tiny_tokenizer(), BOS + "ab") == [1, *ids("ab")]


@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_begins_once(bos):
    tokenizer = tiny_tokenizer(bos=bos, chat=True)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, prompt) == [1, *ids("[user]hi[assistant]")]


def test_an_end_token_after_the_prompt_is_dropped():
    tokenizer = tiny_tokenizer(eos=True)
    assert tokenizer("ab")["input_ids"][-1] == 2
    assert encode(tokenizer, Example("ab", "c"), None)["input_ids"] == [1, *ids("abc"), 2]


def test_the_limit_is_inclusive_and_the_error_names_both_numbers():
    tokenizer, example = tiny_tokenizer(), Example("ab=", "cd")
    assert len(encode(tokenizer, example, 7)["input_ids"]) == 7
    with pytest.raises(ValueError, match=r"7 tokens long.* 6 .*'ab='"):
        encode(tokenizer, example, 6)


@pytest.mark.parametrize("completion", ["", " \n"])
def test_an_empty_completion(completion):
    with pytest.raises(ValueError, match="completion"):
        encode(tiny_tokenizer(), {"prompt": "a", "completion": completion}, None)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"prompt": "a", "completion": ""}, ValueError, "example 2: completion must hold some text, got ''"),
        ({"prompt": "a", "completion": 3}, TypeError, "example 2: completion must be a string, got int"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ValueError, "example 2: .* trained on with fit_preferences"),
    ],
)
def test_an_error_says_which_example(wrong, error, message):
    with pytest.raises(error, match=message):
        encode_all(tiny_tokenizer(), [{"prompt": "a", "completion": "b"}, wrong], None)


def test_a_completion_without_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(ValueError, match="'xx' has no tokens"):
        encode(tokenizer, Example("a", "xx"), None)


def test_a_prompt_without_tokens():
    assert encode_prompt(tiny_tokenizer(), "") == [1]
    with pytest.raises(ValueError, match="no tokens: ''"):
        encode_prompt(tiny_tokenizer(bos=False), "")


def test_a_tokenizer_without_an_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence|eos"):
        encode(tokenizer, Example("a", "b"), None)


class Slow:
    """A tokenizer without offsets, as slow ones are, that puts an end token after every text, or does not."""

    is_fast, bos_token, eos_token, eos_token_id, all_special_ids = False, BOS, "</s>", 2, (1, 2)

    def __init__(self, closes: bool) -> None:
        self.closes, self.fast = closes, tiny_tokenizer(bos=False)

    def __call__(self, text, add_special_tokens=True):
        ids = self.fast(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [1, *ids, *[2] * self.closes] if add_special_tokens else ids}

    def decode(self, row):
        return self.fast.decode(row)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("text", ["ab", "ab</s>", "</s>", "ab</s></s>", "</s>ab</s>"])
def test_a_prompts_own_end_token_stays(closes, text):
    own = tiny_tokenizer(bos=False)(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(Slow(closes), text) == [1, *own]
    assert encode_prompt(tiny_tokenizer(eos=closes), text) == [1, *own]
    encoded = encode(Slow(closes), Example(text, "c"), None)
    assert encoded["input_ids"] == [1, *own, *ids("c"), 2]
