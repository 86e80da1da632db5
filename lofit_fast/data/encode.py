"""From text to token ids, with labels on the completion only."""

from collections.abc import Mapping
from typing import TypedDict

from lofit_fast.tasks.task import Example

IGNORED = -100


class Encoded(TypedDict):
    """One example as token ids; labels are IGNORED where nothing is to be predicted."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer, example: Example | Mapping[str, str], max_length: int | None) -> Encoded:
    """Prompt, completion and an end-of-sequence token; only the last two carry labels.

    The two texts are tokenized apart and joined, so that a prompt's tokens are the same with and without an answer.
    Raises ValueError for a completion without tokens, an example longer than max_length, or a tokenizer without an
    end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    example = as_example(example)
    prompt = encode_prompt(tokenizer, example.prompt)
    ending = [*encode_answer(tokenizer, example.completion), tokenizer.eos_token_id]
    length = len(prompt) + len(ending)
    if max_length is not None and length > max_length:
        raise ValueError(
            f"an example is {length} tokens long, the limit is {max_length} (the model's context, or max_length): "
            f"{example.prompt[:60]!r}..."
        )
    return {"input_ids": prompt + ending, "labels": [IGNORED] * len(prompt) + ending}


def as_example(example: Example | Mapping[str, str]) -> Example:
    """An Example from a mapping with "prompt" and "completion". Raises ValueError naming the keys it has instead."""
    if isinstance(example, Example):
        return example
    if not isinstance(example, Mapping) or not {"prompt", "completion"} <= example.keys():
        got = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(f"expected examples with the keys prompt and completion, got {got}")
    return Example(example["prompt"], example["completion"])


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """The prompt's token ids, with the tokenizer's special tokens unless the text begins with them already.

    Raises ValueError when there is not a single token.
    """
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    if not ids:
        raise ValueError(f"a prompt has no tokens: {prompt!r}")
    # some tokenizers close every text with an end token, after which nothing can be continued
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not has_bos else ids


def encode_answer(tokenizer, answer: str) -> list[int]:
    """An answer's token ids, without special tokens: they are tokenized apart from their prompt.

    Raises ValueError when there is not a single token.
    """
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"nothing to learn from or to score: {answer!r} has no tokens")
    return ids


def encode_pair(tokenizer, prompt: str, answer: str) -> list[int]:
    """A prompt's token ids and its answer's, without an end-of-sequence token. Raises as the two do."""
    return encode_prompt(tokenizer, prompt) + encode_answer(tokenizer, answer)


def pad_token_id(tokenizer) -> int:
    """What fills up a batch: the padding token, or where there is none the end token. Masked either way."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
