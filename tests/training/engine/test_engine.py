"""The engine: what it refuses, what it does to a model, and that it takes all of it back."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.engine import Engine, decoder_layers, prepared
from tests.oracle import randomize
from tests.tiny_models import LAYERS, tiny_model, tokens
from tests.training.engine.engine_effects import belongings, gradients


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": 3}, TypeError, "attention .* got 3"),
        ({"compile": "yes"}, TypeError, "compile .* got 'yes'"),
        ({"packing": None}, TypeError, "packing .* got None"),
        ({"group_by_length": "auto"}, TypeError, "group_by_length .* got 'auto'"),
        ({"narrow": 1}, TypeError, "narrow .* got 1"),
        ({"large_pages": "yes"}, TypeError, "large_pages .* got 'yes'"),
        ({"prefix_cache_gb": -1.0}, ValueError, "prefix_cache_gb >= 0, got -1.0"),
        ({"prefix_cache_gb": float("inf")}, ValueError, "finite prefix_cache_gb >= 0, got inf"),
        ({"prompt_cache_gb": "much"}, TypeError, "prompt_cache_gb .* got 'much'"),
        ({"prompt_cache_gb": True}, TypeError, "prompt_cache_gb .* got True"),
        ({"prompt_cache_gb": float("nan")}, ValueError, "finite prompt_cache_gb >= 0, got nan"),
    ],
)
def test_engine_refuses(options, error, message):
    with pytest.raises(error, match=message):
        Engine(**options)


def test_engine_prepared_refuses_an_attention_that_is_not_here(llama):
    before = belongings(llama)
    scope = prepared(llama, Engine(attention="flash_attention_9"))
    with pytest.raises(ValueError, match="attention 'flash_attention_9' cannot be used here"):
        scope.__enter__()
    assert belongings(llama) == before


def test_engine_prepared_puts_everything_back(family):
    model = tiny_model(family)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    before = belongings(model)
    with pytest.raises(KeyError), prepared(model, Engine(attention="eager", compile=True)):
        assert model.config._attn_implementation == "eager"
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
        raise KeyError
    assert belongings(model) == before
    handle.unpatch()


def test_engine_prepared_keeps_what_the_user_compiled(llama):
    layer = decoder_layers(llama)[1]
    layer.compile(backend="eager")
    mine = layer._compiled_call_impl
    with prepared(llama, Engine(compile=True)):
        assert layer._compiled_call_impl is not mine
    assert layer._compiled_call_impl is mine


def test_engine_auto_changes_nothing_by_itself(llama):
    before = belongings(llama)
    with prepared(llama, Engine()):
        assert belongings(llama) == before


@pytest.mark.slow
@pytest.mark.parametrize(("family", "component"), [("llama", "scale"), ("gemma3", "offset")])
def test_engine_compiled_layers_compute_the_same(family, component, quick_compiler):
    model = tiny_model(family)
    randomize(lf.patch(model, lf.LofitConfig(**{component: "all"})), 0.1)
    expected = gradients(model)
    with prepared(model, Engine(compile=True, attention="eager")):
        loss, got = gradients(model)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert all(
        (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1e-3) for a, b in zip(got, expected[1], strict=True)
    )


@pytest.mark.slow
def test_engine_compiles_a_model_with_hooks_apart(quick_compiler):
    # the two share the code of their layers, and dynamo by itself does not see that one has hooks
    for hooks in ([], [lambda module, args: (2 * args[0],)]):
        model = tiny_model("llama")
        for layer in model.model.layers:
            for hook in hooks:
                layer.self_attn.o_proj.register_forward_pre_hook(hook)
        expected = model(tokens()).logits
        with prepared(model, Engine(compile=True)):
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_engine_compiles_once_for_all_lengths(llama, quick_compiler):
    randomize(lf.patch(llama, lf.LofitConfig(scale="all")), 0.1)
    # with narrow the last layer has a graph of its own: tests/training/engine/test_last_layer.py
    with prepared(llama, Engine(compile=True, narrow=False)):
        gradients(llama, 9)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # the first layer's input needs no gradient, the others' does
        assert 1 <= graphs <= 2 < LAYERS
        for length in (5, 12, 7, 31):
            gradients(llama, length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_engine_no_backward_below_the_lowest_tuned_layer(llama, checkpointing):
    handle = lf.patch(llama, lf.LofitConfig(offset=[(1, 2)]))
    if checkpointing:
        llama.gradient_checkpointing_enable()
        llama.disable_input_require_grads()
    forwards, backwards = [0] * LAYERS, [0] * LAYERS

    def count(number):
        def watch(module, args, output):
            forwards[number] += 1
            if output.requires_grad:
                output.register_hook(lambda _: backwards.__setitem__(number, backwards[number] + 1))

        return watch

    layers = decoder_layers(llama)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(count(number))
        layer.self_attn.register_forward_pre_hook(lambda *_, n=number: recomputed.append(n))
    recomputed = []
    # what comes before the lowest tuned projection needs no gradient either
    layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    seen = []
    gradients(llama.train())
    assert forwards == [1] * LAYERS
    assert backwards == [0, 1, 1]
    assert not any(seen)
    again = 2 if checkpointing else 1
    assert [recomputed.count(n) for n in range(LAYERS)] == [1, again, again]
    handle.unpatch()
