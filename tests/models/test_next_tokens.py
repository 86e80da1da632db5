"""A training on completions wants a loss of next tokens: models of another are refused, and no others."""

import pytest
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.models.next_tokens import check_next_tokens
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model
from tests.tiny_others import tiny_other
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, assert_same_state, state_of


class Halved(LlamaForCausalLM):
    """A forward of its own, whose loss is of next tokens all the same."""

    def forward(self, *given, **more):
        out = super().forward(*given, **more)
        out.loss = out.loss / 2
        return out


@pytest.mark.parametrize("make", [lambda: tiny_family("bart"), lambda: tiny_family("cpmant"), lambda: tiny_other("t5")])
def test_a_loss_of_the_tokens_themselves_is_refused(make, tmp_path):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match="compares the logits at each token with that token"):
        lf.fit(model, tiny_tokenizer(), EXAMPLES, output_dir=tmp_path / "run", progress=False)
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


def test_other_losses_of_next_tokens_are_not():
    passes = []
    for model in (tiny_model("gemma2"), tiny_family("gpt2"), tiny_family("mixtral")):
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        check_next_tokens(model)
    # transformers' own is known
    assert not passes
    model = tiny_model("llama")
    model.__class__ = Halved
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    check_next_tokens(model)
    assert passes == [1]
