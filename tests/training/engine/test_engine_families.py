"""Narrowing, packing and grouped attention in many decoder families: exact, or left alone."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import lofit_fast as lf
from lofit_fast.cpu.attention import GROUPED
from lofit_fast.data.collate import CompletionCollator, stock_logits
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.models.logit_rows import logit_rows
from lofit_fast.models.trials import trial_examples
from lofit_fast.patching.architectures import decoder_layers, text_config
from lofit_fast.training import Engine
from lofit_fast.training.engine.attention_choice import attention_refusal
from lofit_fast.training.engine.attention_scope import attending
from lofit_fast.training.engine.auto import settle
from lofit_fast.training.engine.last_layer import narrowed, narrowing_refusal
from lofit_fast.training.engine.packing_trial import packing_leak
from tests.library_versions import BY_ROW, called, takes_masks
from tests.tiny_families import tiny_family
from tests.training.engine.engine_families import FAMILIES, WRAPPERS, examples, family_model

# one of each kind; the others are slow in sum only
QUICK = ("gemma2", "gemma3n", "qwen3_next_dense", "qwen3_5", "deepseek_v3", "gpt_oss", "jamba", "falcon_h1", "llama4")
QUICK += ("llava", "llava_hybrid", "cohere2", "lfm2", "mixtral")
ALL = (*FAMILIES, *WRAPPERS)
# examples of a packed row see each other in these, by linear attention, convolutions, state spaces, sinks or positions
LEAKING = {"qwen3_next", "qwen3_next_dense", "qwen3_5", "qwen3_5_full_last", "granitemoehybrid", "gpt_oss", "lfm2"}
LEAKING |= {"falcon_h1", "bamba", "jamba", "zamba2", "nemotron_h", "minimax", "afmoe", "recurrent_gemma", "opt"}
LEAKING |= {"llava_hybrid"}
# seen in transformers 5.17.0
LEAKING |= set() if stock_logits() == "rows" else {"llama4"}
# hybrids whose last layer is of another kind than attention
LINEAR_LAST = ("qwen3_next_dense", "qwen3_5", "llava_hybrid")


def marked(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def results(model, batch, parameters):
    """Logits where there is a label, and gradients of their mean loss."""
    given = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    logits = called(model, given).logits.flatten(0, -2)
    loss = nn.functional.cross_entropy(logits.double(), batch["shift_labels"])
    return logits.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def alone(model, rows):
    """Logits where there is a label, of each example by itself."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        found.append(logits[:-1][torch.tensor(row["labels"][1:]) != IGNORED])
    return torch.cat(found)


def first_parameters(model):
    """What everything depends on: the norms and projections of the first layer, as far as they are used."""
    return [parameter for parameter in decoder_layers(model)[0].parameters() if parameter.requires_grad]


def assert_close(got, expected, tolerance=2e-4):
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert (one - other).abs().max() <= tolerance * max(other.abs().max(), 1e-6)


@pytest.mark.parametrize("family", marked(ALL))
def test_narrowing_is_exact_or_does_nothing(family):
    model = family_model(family)
    try:
        parameters = first_parameters(model)
    except ValueError:
        # nothing of it is trained then
        with pytest.raises(ValueError, match="not supported|expected a linear"):
            lf.patch(model, lf.LofitConfig(offset="all"))
        return
    assert narrowing_refusal(model) is None
    batch = CompletionCollator(0, logits=BY_ROW)(examples())
    expected = results(model, batch, parameters)
    with narrowed(model):
        got = results(model, batch, parameters)
    assert_close([got[0], *got[1]], [expected[0], *expected[1]])


@pytest.mark.parametrize("family", LINEAR_LAST)
def test_the_last_layer_is_the_last_of_all(family):
    model = family_model(family)
    layers = decoder_layers(model)
    assert len(layers) == text_config(model).num_hidden_layers
    seen = {}
    for number, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, n=number: seen.__setitem__(n, args[0].shape[:-1].numel())
        )
    batch = CompletionCollator(0, pad_to_multiple_of=1, logits=BY_ROW)(examples())
    with narrowed(model):
        called(model, batch)
    whole = batch["input_ids"].numel()
    assert seen == {0: whole, 1: whole, 2: len(batch["shift_labels"])}


class MixedAfter(nn.Module):
    """A final norm that mixes neighbouring tokens."""

    def forward(self, x):
        return x + x.roll(1, 1)


def test_narrowing_that_would_be_wrong_is_not_chosen(llama):
    llama.model.norm = MixedAfter()
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    rows = trial_examples(llama)
    assert "reads its last MLP in rows without a label" in narrowing_refusal(llama)
    assert settle(handle, Engine(), rows, 0, 2, 3)[0].narrow is False
    with pytest.raises(ValueError, match="narrow=True was asked for, but .*: use narrow=False"):
        settle(handle, Engine(narrow=True), rows, 0, 2, 3)


def test_an_mlp_that_layers_share_is_left_alone(llama):
    llama.model.layers[0].mlp = llama.model.layers[-1].mlp
    batch = CompletionCollator(0, logits=BY_ROW)(examples())
    expected = called(llama, batch).logits
    with narrowed(llama):
        assert called(llama, batch).logits.equal(expected)


@pytest.mark.parametrize("family", marked(ALL))
def test_packing_is_right_or_refused(family):
    model = family_model(family)
    own, rows = text_config(model)._attn_implementation, examples()
    with torch.no_grad():
        expected = alone(model, rows)
        for attention in (own, GROUPED):
            if attention_refusal(model, attention) is not None:
                continue
            kind = PackedCollator(0) if attention == GROUPED else CompletionCollator(0, packed=True)
            collate, padded = replace(kind, logits="rows"), CompletionCollator(0, logits="rows")
            reason = packing_leak(model, attention, lambda packing, c=collate, p=padded: c if packing else p)
            if attention == own:
                assert (reason is not None) == (family in LEAKING), reason
            if reason is None:
                batch = replace(kind, logits=BY_ROW)(rows)
                given = {key: value for key, value in batch.items() if "labels" not in key}
                with attending(model, attention):
                    got = called(model, given).logits.flatten(0, -2)
                assert_close([got], [expected], 1e-3)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, attention) for family in ("qwen3_5", "jamba", "llava_hybrid") for attention in ("own", GROUPED)),
        # grouped attention gives each example a row of its own, sinks and all
        ("gpt_oss", "own"),
        ("qwen3_5", "auto"),
    ],
)
def test_packing_that_leaks_is_refused_before_anything_changes(family, attention):
    model = family_model(family)
    own = text_config(model)._attn_implementation
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(attention=own if attention == "own" else attention, packing=True)
    with pytest.raises(ValueError, match="packing with .* was asked for, but .*: use packing=False"):
        settle(handle, engine, examples(), 0, 3, 1)
    assert text_config(model)._attn_implementation == own
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    auto = settle(handle, Engine(attention=engine.attention), examples(), 0, 3, 1)[0]
    assert auto.packing is False


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3", "granitemoe", "gemma3n", "vaultgemma"])
def test_grouped_attention_has_the_gradients_of_the_models_own(family):
    model = family_model(family)
    parameters = [p for layer in (model.model.layers[0], model.model.layers[1]) for p in layer.parameters()]
    batch = CompletionCollator(0, logits=BY_ROW)(examples())
    expected = results(model, batch, parameters)
    assert attention_refusal(model, GROUPED) is None
    with attending(model, GROUPED):
        got = results(model, batch, parameters)
    assert_close([got[0], *got[1]], [expected[0], *expected[1]])


@pytest.mark.parametrize("family", ["llava", "gemma3_wrapper"])
def test_grouped_attention_is_for_the_decoder_alone(family):
    model = family_model(family)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    with attending(model, GROUPED):
        assert text_config(model)._attn_implementation == GROUPED
        assert model.config.vision_config._attn_implementation != GROUPED
    assert [config._attn_implementation for config in configs] == before


@takes_masks
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llava", "gemma3n"])
def test_stock_forwards_take_masks(family):
    assert logit_rows(family_model(family)) == "rows"


@pytest.mark.parametrize("name", ["deepseek_v32", "dots3_note_text", "minimax_m3_vl_text"])
def test_packing_is_refused_where_attention_picks_tokens_in_the_whole_row(name):
    model = tiny_family(name)
    collators = {packing: CompletionCollator(0, packed=packing) for packing in (False, True)}
    # a trial's row is shorter than what a real model picks
    assert "picks what it attends to in the whole row" in packing_leak(model, "eager", collators.get)


def test_a_tower_without_the_decoders_attention_does_not_stand_in_its_way():
    try:
        tiny_family("gemma4").set_attn_implementation("sdpa")
    except ValueError as error:
        assert "Gemma4AudioModel does not support" in str(error)
    else:
        pytest.skip(f"in transformers {transformers.__version__} every tower of Gemma 4 has this attention")
    model = tiny_family("gemma4")
    own = text_config(model)._attn_implementation
    with attending(model, own):
        assert text_config(model)._attn_implementation == own
