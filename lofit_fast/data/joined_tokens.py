"""Token ids of a text, and of a prompt joined to its answer: where the answer begins, and what it changes."""

from collections.abc import Sequence
from dataclasses import dataclass

from lofit_fast.tasks.chat import Rendered


@dataclass(frozen=True)
class Pair:
    """A joined text: its ids, where the completion begins, and how the prompt's tokens changed, or ""."""

    ids: list[int]
    start: int
    moved: str = ""


def pairs_of(tokenizer, prompt: str, answers: Sequence[str]) -> list[Pair]:
    """The prompt joined to each answer. Raises ValueError for a prompt or an answer without tokens."""
    special = has_special(prompt)
    alone, *joined = tokenized(tokenizer, [prompt, *(prompt + answer for answer in answers)], special)
    if not alone:
        raise ValueError(f"a prompt has no tokens: {prompt!r}")
    return [_pair(tokenizer, prompt, answer, alone, ids) for answer, ids in zip(answers, joined, strict=True)]


def _pair(tokenizer, prompt: str, answer: str, alone: list[int], ids: list[int]) -> Pair:
    if ids[: len(alone)] == alone:
        if len(ids) == len(alone):
            raise no_tokens(answer)
        return Pair(ids, len(alone))
    if has_offsets(tokenizer):
        spans = offsets(tokenizer, prompt + answer, has_special(prompt))
        start = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
    else:
        start = common_start(alone, ids)
    if start == len(ids):
        raise no_tokens(answer)
    moved = boundary_change(tokenizer, prompt, answer, alone, ids)
    if start == 0:
        apart = encode_answer(tokenizer, answer)
        return Pair(alone + apart, len(alone), f"{moved}, with nothing before it, so that they are tokenized apart")
    return Pair(ids, start, moved)


def encode_answer(tokenizer, answer: str) -> list[int]:
    """An answer's token ids by itself, without special tokens. Only for where it cannot be joined to its prompt.

    Raises ValueError when there is not a single token.
    """
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not ids:
        raise no_tokens(answer)
    return ids


def has_special(prompt: str) -> bool:
    """Whether the tokenizer is to put its special tokens around a text."""
    return not isinstance(prompt, Rendered)


def has_offsets(tokenizer) -> bool:
    """Whether the tokenizer says which characters a token holds, as fast ones do."""
    return bool(getattr(tokenizer, "is_fast", False))


def tokenized(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of each text, with special tokens in front, once, and none after it."""
    if not has_offsets(tokenizer):
        return [_slow(tokenizer, text, special) for text in texts]
    out = tokenizer(texts, add_special_tokens=special, return_special_tokens_mask=True)
    rows = zip(out["input_ids"], out["special_tokens_mask"], strict=True)
    return [ids[_own(ids, mask)] for ids, mask in rows]


def offsets(tokenizer, text: str, special: bool) -> list[tuple[int, int]]:
    """Per token of `tokenized` which characters of the text it holds."""
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True)
    return out["offset_mapping"][_own(out["input_ids"], out["special_tokens_mask"])]


def _own(ids: list[int], mask: list[int]) -> slice:
    """Without special tokens after the text, and without those in front of a text that begins with them already."""
    front = next((i for i, special in enumerate(mask) if not special), len(mask))
    end = len(mask)
    while end > front and mask[end - 1]:
        end -= 1
    return slice(front if front and ids[front : 2 * front] == ids[:front] else 0, end)


def _slow(tokenizer, text: str, special: bool) -> list[int]:
    """The same of a tokenizer that does not say which tokens it added."""
    begun = not special or (bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token))
    ids = list(tokenizer(text, add_special_tokens=not begun)["input_ids"])
    if begun or len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        return ids
    # some tokenizers close every text with an end token, after which nothing can be continued; a text's own is its own
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[:-1] if ids[-1 - len(own) : -1] == own else ids


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def boundary_change(tokenizer, prompt: str, answer: str, alone: list[int], ids: list[int]) -> str:
    """What the prompt's tokens are alone and joined, from where they differ."""
    same = common_start(alone, ids)
    end = [repr(tokenizer.decode(row[same : same + 3])) for row in (alone, ids)]
    return f"{prompt[-40:]!r} goes on {end[0]} alone and {end[1]} before {answer[:40]!r}"


def no_tokens(answer: str) -> ValueError:
    """The error for an answer of which the tokenizer makes nothing."""
    return ValueError(f"nothing to learn from or to score: {answer!r} has no tokens")
