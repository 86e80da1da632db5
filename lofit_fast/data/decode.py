"""From token ids to text, as it was written."""

from collections.abc import Sequence

# tokens before a continuation behind which it is decoded
_BEFORE = 8


def decoded(tokenizer, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids, with no space taken out of it. special: whether special tokens are shown."""
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def continuation(tokenizer, before: Sequence[int], ids: Sequence[int], *, special: bool = False) -> str:
    """What ids add to the text of those before them: some tokenizers drop the space of a text's first word."""
    before = list(before[-_BEFORE:])
    start, whole = (decoded(tokenizer, row, special=special) for row in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else decoded(tokenizer, ids, special=special)
