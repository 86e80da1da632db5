"""Greedy answers are those of each prompt alone, whatever the family makes of padding and of neighbours."""

import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

from lofit_fast.data.padding import padded
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.evaluation.prompt_batches import prompt_batches
from lofit_fast.models.trials import remembering
from tests.tiny_families import tiny_config, tiny_family
from tests.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# two of one length
PROMPTS = ["Q: abcdefg hij klmno?", "ab", "Q: xyz", "Q: is the a b c d e", "Q: vwx"]
LENGTHS = [22, 3, 7, 20, 7]
EQUAL, NONE = "only prompts of equal length are continued together", "each prompt is continued by itself"


def spread(model):
    """Larger weights: answers that depend on the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def dynamic():
    """No trial of a few tokens shows that its angles change with the longest prompt."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(tiny_config("llama", max_position_embeddings=24, rope_parameters=rope)).eval()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny_family("minimax"), EQUAL),
        pytest.param(lambda: tiny_family("prophetnet"), EQUAL, marks=pytest.mark.slow),
        (lambda: tiny_family("bart"), EQUAL),
        pytest.param(lambda: tiny_family("deepseek_v32"), EQUAL, marks=pytest.mark.slow),
        (lambda: tiny_family("rwkv"), NONE),
    ],
    ids=["minimax", "prophetnet", "bart", "deepseek_v32", "rwkv"],
)
def test_answers_do_not_depend_on_the_batch(make, said):
    model = spread(make())
    before, state = model.training, torch.get_rng_state()
    alone = [generate_answers(model, TOKENIZER, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    with pytest.warns(UserWarning, match=said) as told, remembering():
        for size in (2, 3, 5):
            assert generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=size) == alone
    assert len([one for one in told if "depend on the batch" in str(one.message)]) == 1
    assert model.training is before
    assert torch.equal(torch.get_rng_state(), state)


def test_some_of_them_would():
    model = spread(tiny_family("bart"))
    ids, mask = padded([[1, 5, 6, 7, 8, 9], [1, 5]], 0, side="left")
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask).logits[1, -1]
        alone = model(input_ids=ids[1:, -2:]).logits[0, -1]
    assert (both - alone).norm() > 0.1 * alone.norm()


def batches(model, size):
    return prompt_batches(model, LENGTHS, size, 0, Division(model, "trying"))


def test_others_are_batched_as_asked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("llama", "gpt2", "mixtral", "jamba"):
            assert batches(tiny_family(name), 3) == [[0, 3, 2], [4, 1]]


def test_equal_lengths_share_a_batch():
    with pytest.warns(UserWarning, match="depends on the length of the whole sequence"):
        assert batches(dynamic(), 3) == [[0], [3], [2, 4], [1]]


def test_a_prompt_at_a_time_takes_no_trial():
    model, passes = tiny_family("bart"), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert batches(model, 1) == [[0], [3], [2], [4], [1]]
    assert not passes
