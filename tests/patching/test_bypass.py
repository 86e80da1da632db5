"""Attention that does not call its projection: seen in a forward, where its source does not say so."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import lofit_fast as lf
from tests.library_versions import compiles_hooks
from tests.oracle import randomize
from tests.ordinary_sample import crossed
from tests.patched_models import logits, snapshot
from tests.patching.bypassing_attention import bypassing, replace, weight_of
from tests.tiny_models import tiny_model, tokens

MISSED = "LlamaAttention has read its projection's weight and not called"


def patched(layers=3):
    handle = lf.patch(tiny_model("llama", num_hidden_layers=layers), lf.LofitConfig(offset="all"))
    randomize(handle)
    return handle


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_an_attention_that_multiplies_by_the_weight_itself_is_an_error(layers, grad):
    handle = patched(layers)
    replace(handle.model.model, layers - 1)
    for _ in range(2):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=MISSED):
            logits(handle.model)


def test_it_is_an_error_in_a_layer_that_a_named_adapter_has_added():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 1)]))
    handle.add("b", lf.LofitConfig(offset=[(2, 1)], init_std=0.5), trained=False)
    replace(handle.model.model, 2)
    handle.set_active("b")
    with pytest.raises(ValueError, match=MISSED):
        logits(handle.model)


def test_a_layer_that_multiplies_for_its_attention_is_an_error():
    handle = patched()
    layer = handle.model.model.layers[1]
    layer.self_attn.forward = MethodType(LlamaAttention.forward, layer.self_attn)

    def forward(self, hidden_states, **kwargs):
        return nn.functional.linear(hidden_states.repeat(1, 1, 2), weight_of(self.self_attn))

    layer.forward = MethodType(forward, layer)
    with pytest.raises(ValueError, match="has read its projection's weight and not called"):
        logits(handle.model)


@pytest.mark.parametrize("own", [True, False])
def test_a_forward_that_comes_after_the_first_is_an_error_too(own, monkeypatch):
    handle = patched()
    logits(handle.model)
    if own:
        replace(handle.model.model)
    else:
        monkeypatch.setattr(LlamaAttention, "forward", bypassing)
    for _ in range(2):
        with pytest.raises(ValueError, match=MISSED):
            logits(handle.model)


def test_a_class_that_has_another_forward_is_read_again(monkeypatch):
    patched().unpatch()

    def forward(self, hidden_states, **kwargs):
        return nn.functional.linear(hidden_states.repeat(1, 1, 2), self.o_proj.weight), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match="multiplies by its projection's weight itself"):
        patched()


@compiles_hooks
@pytest.mark.parametrize("fullgraph, later", crossed([False, True], [False, True]))
def test_a_model_compiled_whole_is_no_exception(dynamo, fullgraph, later):
    handle = patched()
    run = torch.compile(handle.model, backend="eager", fullgraph=fullgraph)
    if later:
        logits(run)
    replace(handle.model.model)
    wanted = (torch._dynamo.exc.Unsupported, "run one forward before torch") if fullgraph else (ValueError, MISSED)
    for _ in range(2):
        with pytest.raises(wanted[0], match=wanted[1]):
            logits(run)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_watches_its_own(twin_of):
    handle = patched()
    other = lf.handle_of(twin_of(handle.model))
    replace(other.model.model)
    logits(handle.model)
    with pytest.raises(ValueError, match="and not called"):
        logits(other.model)
    other.unpatch()
    logits(other.model)


def test_the_watch_ends_with_the_handle():
    model = tiny_model("llama").requires_grad_(False)
    before = snapshot(model)
    lf.patch(model, lf.LofitConfig(offset="all")).unpatch()
    assert snapshot(model) == before


def reads_beside_the_call(handle):
    """A dtype, asked after the call."""
    attention = handle.model.model.layers[1].self_attn
    usual = attention.forward

    def forward(*args, **kwargs):
        out, weights = usual(*args, **kwargs)
        return out.to(weight_of(attention).dtype), weights

    attention.forward = forward


def reads_in_a_hook(handle):
    handle.layers[1].register_forward_hook(lambda layer, args, output: output + 0 * layer.weight.sum())


def reads_all_and_drops_one(handle):
    """What notes weights before a forward in which a layer does not run."""
    decoder = handle.model.model
    decoder.register_forward_pre_hook(lambda *_: [layer.weight for layer in handle.layers.values()] and None)
    decoder.layers[1].forward = lambda hidden_states, **kwargs: hidden_states


def drops_an_attention(handle):
    attention = handle.model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)


@pytest.mark.parametrize(
    "change", [reads_beside_the_call, reads_in_a_hook, reads_all_and_drops_one, drops_an_attention]
)
def test_other_readers_and_layers_that_do_not_run_are_no_matter(change):
    handle = patched()
    change(handle)
    for _ in range(2):
        assert logits(handle.model).isfinite().all()


def test_a_layer_called_singly_is_no_matter():
    handle = patched()
    layer = handle.layers[1]
    assert layer.weight.shape == (32, 64) and layer(torch.ones(1, 64)).shape == (1, 32)
    assert logits(handle.model).shape == (*tokens().shape, 97)
