"""Training on answers wants next tokens from those before them: models of another kind are refused, and no others."""

import pytest
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.models.next_tokens import check_next_tokens
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model
from tests.tiny_others import tiny_other
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, assert_same_state, state_of

OF_ITSELF, OF_LATER = "compares the logits at each token with that token", "see those that come after them"


def undecided():
    model = tiny_family("roberta")
    config = model.config
    config.is_decoder = False
    return type(model)(config).eval()


class Halved(LlamaForCausalLM):
    """A forward of its own, whose loss is of next tokens all the same."""

    def forward(self, *given, **more):
        out = super().forward(*given, **more)
        out.loss = out.loss / 2
        return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_family("bart"), OF_ITSELF),
        (lambda: tiny_family("cpmant"), OF_ITSELF),
        (lambda: tiny_other("t5"), f"{OF_ITSELF}|{OF_LATER}"),
        (lambda: tiny_other("bert"), OF_LATER),
        (undecided, OF_LATER),
    ],
    ids=["bart", "cpmant", "t5", "masked bert", "roberta"],
)
def test_what_predicts_other_tokens_is_refused(make, message, tmp_path):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        lf.fit(model, tiny_tokenizer(), EXAMPLES, output_dir=tmp_path / "run", progress=False)
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


def test_preferences_have_a_loss_of_their_own():
    check_next_tokens(tiny_family("bart"), own_loss=False)
    with pytest.raises(ValueError, match=OF_LATER):
        check_next_tokens(undecided(), own_loss=False)


def test_decoders_are_not():
    passes = []

    def counted(model):
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        check_next_tokens(model)

    for model in (tiny_model("gemma2"), tiny_family("gpt2"), tiny_family("mixtral")):
        counted(model)
    # by their code
    assert not passes
    model = tiny_model("llama")
    model.__class__ = Halved
    for tried in (model, tiny_family("roberta"), tiny_family("reformer")):
        counted(tried)
    assert len(passes) == 3
