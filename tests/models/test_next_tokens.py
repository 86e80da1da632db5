"""Training on answers wants next tokens from those before them: models of another kind are refused, and no others."""

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.models.next_tokens import check_next_tokens
from lofit_fast.models.trials import remembering
from tests.tiny_families import tiny_config, tiny_family
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


def undecided_qwen2():
    return made("qwen2", "Qwen2ForCausalLM", is_causal=False)


def both_ways():
    return made("gemma3_text", "Gemma3ForCausalLM", use_bidirectional_attention=True)


def without_a_mask():
    """What no config says: its attention looks ahead in batches without padding."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def made(model_type, name, **changes):
    torch.manual_seed(0)
    return getattr(transformers, name)(tiny_config(model_type, **changes)).eval()


class Halved(LlamaForCausalLM):
    """A forward of its own, whose loss is of next tokens all the same."""

    def forward(self, *given, **more):
        out = super().forward(*given, **more)
        out.loss = out.loss / 2
        return out


class Silent(LlamaForCausalLM):
    """A forward that takes labels and gives no loss."""

    def forward(self, *given, labels=None, **more):
        return super().forward(*given, **more)


def of_class(kind):
    model = tiny_model("llama")
    model.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_family("bart"), OF_ITSELF),
        (lambda: tiny_family("cpmant"), OF_LATER),
        (lambda: tiny_other("t5"), f"{OF_ITSELF}|{OF_LATER}"),
        (lambda: tiny_other("bert"), OF_LATER),
        (undecided, OF_LATER),
        (undecided_qwen2, OF_LATER),
        (both_ways, OF_LATER),
        (lambda: tiny_family("paligemma"), OF_LATER),
        (without_a_mask, OF_LATER),
        # it takes the first logits for those of an image
        (lambda: tiny_family("git"), r"GitForCausalLM computes logits of tokens, but no loss of them \(ValueError: "),
        (lambda: of_class(Silent), r"no loss of them \(it is None where labels are given\)"),
    ],
    ids=["bart", "cpmant", "t5", "masked bert", "roberta", "qwen2", "gemma3", "paligemma", "unmasked llama"]
    + ["git", "without a loss"],
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
    check_next_tokens(tiny_family("git"), own_loss=False)
    with pytest.raises(ValueError, match=OF_LATER):
        check_next_tokens(undecided(), own_loss=False)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "nemotron_h", "roberta", "reformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_not(name, dtype):
    model = tiny_family(name, dtype).train()
    before, state = state_of(model), torch.get_rng_state()
    check_next_tokens(model)
    # its code counts its buckets in a first forward, and keeps the number there
    assert_same_state(model, before, but=("config",) if name == "reformer" else ())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_of_its_own_kind_is_not():
    check_next_tokens(of_class(Halved))


def test_no_class_is_taken_at_its_word():
    passes = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with remembering():
        check_next_tokens(model)
        assert passes
        tried = len(passes)
        # both learn it from one trial
        assert length_refusal(model) is None
        check_next_tokens(model, own_loss=False)
        assert len(passes) == tried


@pytest.mark.parametrize("make", [undecided_qwen2, both_ways, lambda: tiny_family("paligemma"), without_a_mask])
def test_sequences_of_such_models_share_no_row(make):
    assert length_refusal(make()) == "attention is bidirectional"
    assert length_refusal(tiny_family("gemma4")) is None
