"""From token ids to text, as it was written."""

from collections.abc import Sequence

# what a tokenizer makes of bytes that are no whole character
PARTIAL = "\N{REPLACEMENT CHARACTER}"
# how many tokens before a continuation it may be decoded behind
_BEFORE = (8, 32, 128)


def decoded(tokenizer, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids, with no space taken out of it. special: whether special tokens are shown."""
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def continuation(tokenizer, before: Sequence[int], ids: Sequence[int], *, special: bool = False) -> str:
    """What ids add to the text of those before them: some tokenizers drop the space of a text's first word."""
    before = last_tokens(tokenizer, before)
    start, whole = (decoded(tokenizer, row, special=special) for row in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else decoded(tokenizer, ids, special=special)


def last_tokens(tokenizer, before: Sequence[int]) -> list[int]:
    """Tokens behind which a continuation reads as behind all of them: a few, which begin with a whole character.

    Some tokenizers write a rare character as a token for each byte, and show no byte of a run that begins inside one.
    """
    for count in _BEFORE if before else ():
        tail = list(before[-count:])
        if not decoded(tokenizer, tail, special=True).startswith(PARTIAL):
            return tail
    return []


def special_tokens(tokenizer) -> dict[int, str]:
    """id -> text of all tokens that a text without special tokens does not show, named by the tokenizer or not."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return dict(named) | {number: token.content for number, token in added.items() if token.special}
