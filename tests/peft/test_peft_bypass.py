"""Attention that does not call its projection, under LoFiT as a method of PEFT: seen in a forward."""

import copy
import gc

import pytest
import torch

pytest.importorskip("peft")
from peft import get_peft_model

from lofit_fast.peft import LofitPeftConfig, LofitPeftLayer
from tests.patched_models import logits
from tests.patching.bypassing_attention import replace
from tests.peft.peft_models import fill, quietly
from tests.tiny_models import tiny_model

MISSED = "LlamaAttention has read its projection's weight and not called"


def adapted(**heads):
    model = get_peft_model(tiny_model("llama"), LofitPeftConfig(task_type="CAUSAL_LM", **(heads or {"scale": "all"})))
    fill(model)
    return model.eval()


def decoder_of(model):
    return model.base_model.model.model


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_that_passes_the_vectors_over_is_an_error(grad):
    model = adapted()
    replace(decoder_of(model))
    for _ in range(2):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=MISSED):
            logits(model)


def test_where_no_vectors_act_it_is_no_matter():
    model = adapted()
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model = adapted()
    replace(decoder_of(model))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=MISSED):
        logits(model)
    torch.testing.assert_close(logits(quietly(model.unload)), base)


def test_a_layer_of_a_second_adapter_is_watched():
    model = adapted(scale=[(0, 1)])
    model.add_adapter("b", LofitPeftConfig(task_type="CAUSAL_LM", scale=[(2, 1)]))
    replace(decoder_of(model), 2)
    logits(model)
    model.set_adapter("b")
    with pytest.raises(ValueError, match=MISSED):
        logits(model)


def test_a_copy_watches_itself_and_one_of_a_part_nothing():
    model = adapted()
    twin = copy.deepcopy(model)
    replace(decoder_of(twin))
    logits(model)
    with pytest.raises(ValueError, match=MISSED):
        logits(twin)
    del twin
    gc.collect()
    held = sum(isinstance(one, LofitPeftLayer) for one in gc.get_objects())
    part = copy.deepcopy(decoder_of(model).layers[0].self_attn)
    assert sum(isinstance(one, LofitPeftLayer) for one in gc.get_objects()) == held + 1
    assert part.o_proj is not decoder_of(model).layers[0].self_attn.o_proj


def test_the_watch_ends_with_the_adapters():
    model = adapted()
    decoder = decoder_of(model)
    assert decoder._forward_hooks
    model.unload()
    assert not decoder._forward_hooks
