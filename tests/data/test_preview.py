"""Encoded examples as text again, with what is learned marked."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lofit_fast.data.encode import IGNORED, encode
from lofit_fast.data.preview import Part, marked, preview
from tests.tiny_tokenizers import tiny_tokenizer


def test_the_completion_and_its_end_are_marked():
    tokenizer = tiny_tokenizer()
    parts = preview(tokenizer, encode(tokenizer, {"prompt": "2+2=", "completion": " 4"}, None))
    assert parts == [Part("<s>2+2=", False, 5), Part(" 4</s>", True, 3)]
    assert marked(parts) == "<s>2+2=[[ 4</s>]]"


def test_several_learned_parts():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    labels = [IGNORED, ids[1], ids[2], IGNORED, IGNORED, ids[5]]
    assert marked(preview(tokenizer, {"input_ids": ids, "labels": labels})) == "a[[bc]]de[[f]]"
    assert preview(tokenizer, {"input_ids": [], "labels": []}) == []


def test_a_space_that_a_tokenizer_drops_at_the_beginning_stays_where_it_stands():
    words = {"\u2581the": 0, "\u2581sky": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.decode([1]) == "sky"
    parts = preview(tokenizer, {"input_ids": [0, 1, 2], "labels": [IGNORED, 1, 2]})
    assert [part.text for part in parts] == ["the", " sky</s>"]


@pytest.mark.parametrize("room", [None, 9])
def test_long_parts_are_shortened_in_the_middle(room):
    text = marked([Part("x" * 30 + "y", False, 31), Part("abc", True, 1)], room)
    assert text == ("x" * 30 + "y[[abc]]" if room is None else "xxxxxx ...(22 characters)... xxy[[abc]]")
