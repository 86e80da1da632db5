"""Text that is shown token by token is the text that the whole answer has, up to the first stop string."""

import pytest

from lofit_fast.serving.token_text import TokenText
from tests.tiny_tokenizers import tiny_tokenizer


def shown(tokenizer, ids, stop=()):
    text = TokenText(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.rest()], text.stopped


@pytest.mark.parametrize(
    "answer, stop, expected",
    [
        ("a b c", (), "a b c"),
        ("one. two. three.", ("two",), "one. "),
        ("one. two. three.", ("zwei", ". t"), "one"),
        # the nearest of several, and one inside another
        ("abcd", ("cd", "bcd"), "a"),
        # never there as a whole
        ("almost st", ("sto",), "almost st"),
        ("aab", ("ab",), "a"),
    ],
)
def test_stop_strings(answer, stop, expected):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    pieces, stopped = shown(tokenizer, ids, stop)
    assert "".join(pieces) == expected
    assert stopped == (expected != answer)


def test_what_may_become_a_stop_string_is_held_back():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("xsty", add_special_tokens=False)["input_ids"]
    assert shown(tokenizer, ids, ("stop",))[0] == ["x", "", "", "sty", ""]


class Bytes:
    """A tokenizer of bytes: a character may take several tokens."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_character_is_never_shown():
    text = "na\u00efve \U0001f642!"
    pieces, _ = shown(Bytes(), text.encode())
    assert "".join(pieces) == text
    assert all(piece.isascii() or piece in "\u00ef\U0001f642" for piece in pieces)
    # an answer that was cut there shows that something is missing
    assert "".join(shown(Bytes(), text.encode()[:-3])[0]).startswith("na\u00efve ")


class Words:
    """A tokenizer that puts a space before every word but the first of a text, as SentencePiece does."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return " ".join(f"w{number}" for number in ids)


def test_words_keep_their_spaces():
    assert "".join(shown(Words(), [1, 2, 3, 4])[0]) == "w1 w2 w3 w4"
