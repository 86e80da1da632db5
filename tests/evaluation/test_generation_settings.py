"""Settings of generate that stand alone: what a model was published with changes no answer, and stays."""

import copy

import pytest
import torch
from transformers import GenerationConfig

import lofit_fast as lf
from lofit_fast.data.encode import encode_prompt
from lofit_fast.evaluation.generation_settings import StandingAlone, ends_of
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.evaluation.shared_prompts import SharedPrompts
from tests.oracle import randomize
from tests.tiny_models import VOCAB, spread, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

PROMPTS = ["abcdef", "q", "x=1; y=2;"]
TOKENIZER = tiny_tokenizer()
# a setting of a published generation_config.json that changes what is written, or that generate refuses by itself
PUBLISHED = {
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 5, "min_p": 0.1, "typical_p": 0.5},
    "suppress_tokens": {"suppress_tokens": list(range(3, VOCAB, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, VOCAB, 2))},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, VOCAB, 2)]},
    "sequence_bias": {"sequence_bias": [[[token], -100.0] for token in range(3, VOCAB, 2)]},
    "guidance_scale": {"guidance_scale": 9.0},
    "repetition_penalty": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0, "encoder_no_repeat_ngram_size": 1},
    "forced tokens": {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    "length": {"max_length": 3, "max_time": 0.0, "exponential_decay_length_penalty": [1, 9.0]},
    "stop_strings": {"stop_strings": ["a"]},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -9.0},
    "watermark": {"watermarking_config": {"bias": 99.0, "greenlist_ratio": 0.1}},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.fixture(scope="module")
def model():
    return spread(tiny_model("llama"))


@pytest.fixture(scope="module")
def expected(model):
    return generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=4)


@pytest.fixture(params=PUBLISHED)
def published(model, request):
    """The model as if it had been published with such settings."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    model.generation_config.update(**PUBLISHED[request.param])
    yield copy.deepcopy(model.generation_config)
    model.generation_config = before


def test_answers_are_greedy(model, published, expected):
    own = model.generation_config
    assert generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=4) == expected
    assert model.generation_config is own and own.to_dict() == published.to_dict()


@pytest.mark.parametrize("name", ["beams", "a dictionary", "sampling"])
def test_prompts_are_shared_all_the_same(name, recwarn):
    model = spread(tiny_model("llama"))
    model.generation_config.update(**PUBLISHED[name])
    randomize(lf.patch(model, lf.LofitConfig(offset=[(1, 2)], positions="answer")))
    expected = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=2)
    shared = SharedPrompts()
    assert generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=2, shared=shared) == expected
    assert shared.computed == len(PROMPTS) and not [w for w in recwarn if "not shared" in str(w.message)]


def test_no_setting_of_the_model_gets_in(model):
    """Whatever transformers' settings are, and those that a publisher makes up."""
    settings = StandingAlone(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[2])
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig(bos_token_id=11, decoder_start_token_id=12)
    expected, _ = bare._prepare_generation_config(settings)
    loud = copy.copy(model)
    loud.generation_config = GenerationConfig(bos_token_id=11, decoder_start_token_id=12)
    names = {name for name, value in vars(GenerationConfig()).items() if value is None and not name.startswith("_")}
    for name in names - {"bos_token_id", "decoder_start_token_id", "watermarking_config"}:
        setattr(loud.generation_config, name, "loud")
    loud.generation_config.made_up = "loud"
    found, _ = loud._prepare_generation_config(settings)
    assert len(names) > 50 and vars(found) == vars(expected)
    assert (found.bos_token_id, found.decoder_start_token_id, found.max_length) == (11, 12, None)


def test_generate_has_nothing_to_warn_of(model, caplog):
    model = copy.copy(model)
    model.generation_config = GenerationConfig(max_length=30, eos_token_id=2)
    with caplog.at_level("WARNING", logger="transformers"):
        generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=4)
    assert "max_length" not in caplog.text


def test_all_tokens_that_end_an_answer_do(model):
    model = copy.copy(model)
    ids = torch.tensor([encode_prompt(TOKENIZER, PROMPTS[0])])
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
    for listed in (first, [first, 3]):
        model.generation_config = GenerationConfig(eos_token_id=listed)
        assert ends_of(model, TOKENIZER) == {
            TOKENIZER.eos_token_id,
            *(listed if isinstance(listed, list) else [listed]),
        }
        assert generate_answers(model, TOKENIZER, PROMPTS[:1], max_new_tokens=4) == [
            TOKENIZER.decode([first], skip_special_tokens=True)
        ]
