"""Models whose numbers overflow: no answer, score or accuracy is made of what is not finite."""

import math

import pytest
import torch

import lofit_fast as lf
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.evaluation.logprobs import log_probs
from lofit_fast.selection.linear_probes import head_activations
from lofit_fast.tasks.contrast import Contrast
from lofit_fast.tasks.task import Example, MultipleChoice, Task
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

CHOICES = Task("choices", [], [], choices=(MultipleChoice("a=", ("b", "c"), (0,), 0),))
EXAMPLES = Task("examples", [], [Example("a=", "b")])
ROW = {"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}
# what is asked of a model
ASKED = {
    "generate": lambda model, tok: generate_answers(model, tok, ["a=", "b"]),
    "exact match": lambda model, tok: lf.judge(model, tok, EXAMPLES),
    "choices": lambda model, tok: lf.judge(model, tok, CHOICES),
    "scores": lambda model, tok: score_choices(model, tok, ["a="], [["b", "c"]]),
    "references": lambda model, tok: log_probs(model, [ROW], 0),
}


def overflowing(value, where="head"):
    model = tiny_model("llama")
    with torch.no_grad():
        weight = model.lm_head.weight if where == "head" else model.model.layers[0].mlp.down_proj.weight
        weight[5].fill_(value)
    return model


@pytest.mark.parametrize("value", (math.nan, pytest.param(math.inf, marks=pytest.mark.slow)))
@pytest.mark.parametrize("asked", ASKED)
def test_what_is_not_finite_is_no_result(asked, value):
    with pytest.raises(FloatingPointError, match="not finite|is -?inf|is nan"):
        ASKED[asked](overflowing(value), tiny_tokenizer())


def test_the_prompt_is_named():
    with pytest.raises(FloatingPointError, match=r"prompt 2 \('second'\)|prompt 1 \('a='\)"):
        generate_answers(overflowing(math.nan), tiny_tokenizer(), ["a=", "second"])


def test_activations_that_are_not_finite_are_no_missing_heads():
    contrasts = [Contrast("a=", "b", "c")] * 2
    with pytest.raises(FloatingPointError, match="layer 1"):
        head_activations(overflowing(math.nan, "layer"), tiny_tokenizer(), contrasts)


def test_a_forbidden_token_is_no_fault():
    """Models forbid tokens by minus infinity: that is a number like any other."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    answers = generate_answers(model, tokenizer, ["a="])

    def forbid(module, args, logits):
        logits[..., 96] = -math.inf
        return logits

    model.lm_head.register_forward_hook(forbid)
    assert len(generate_answers(model, tokenizer, ["a="])) == len(answers)
    assert lf.judge(model, tokenizer, CHOICES).metrics["mc2"] > 0
