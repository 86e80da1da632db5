"""Which columns are taken in full: the outliers, the same at any time, and none where the model does not run."""

import warnings

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.outlier_columns import outlier_columns
from tests.oracle import randomize
from tests.tiny_models import tiny_model
from tests.training.engine.engine_effects import belongings, gradients

INT8 = Engine(frozen_products="int8")


def linears(model):
    return {
        f"{number}.{name}": m
        for number, layer in enumerate(decoder_layers(model))
        for name, m in layer.named_modules()
        if type(m) is torch.nn.Linear
    }


def columns_of(model):
    named = linears(model)
    found = outlier_columns(model, named.values(), "int8")
    return {name.replace(".inner", ""): found[m].kept.tolist() for name, m in named.items() if m in found}


def with_outliers():
    """A model with large numbers in column 7 of what attention reads, and in column 12 of what the MLP reads."""
    model = tiny_model("llama").requires_grad_(False)
    for layer in decoder_layers(model):
        layer.input_layernorm.weight[7] = 40.0
        layer.post_attention_layernorm.weight[12] = 40.0
    return model


def test_outliers_are_found():
    found = columns_of(with_outliers())
    assert len(found) == len(linears(with_outliers()))
    for name, kept in found.items():
        if "q_proj" in name or "v_proj" in name:
            assert 7 in kept
        if "up_proj" in name:
            assert 12 in kept
    assert {len(kept) for name, kept in found.items() if "q_proj" in name} == {2}


def test_linears_that_read_one_tensor_share_their_columns(llama):
    llama.requires_grad_(False)
    with prepared(llama, INT8):
        layer = decoder_layers(llama)[1]
        columns = {n: getattr(layer.self_attn, f"{n}_proj").lofit_products.columns for n in "qkvo"}
        assert columns["q"] is columns["k"] is columns["v"] is not columns["o"]
        assert layer.mlp.gate_proj.lofit_products.columns is layer.mlp.up_proj.lofit_products.columns


def test_columns_are_those_of_the_base_at_any_time():
    model = with_outliers()
    before = columns_of(model)
    handle = lf.patch(model, lf.LofitConfig(scale="all", offset="all"))
    randomize(handle, 3.0)
    model.train()
    state, random = belongings(model), torch.get_rng_state()
    assert columns_of(model) == before
    assert belongings(model) == state and torch.get_rng_state().equal(random)
    assert all(m.training for m in model.modules())


def test_columns_in_full_bring_gradients_closer(monkeypatch):
    model = with_outliers()
    randomize(lf.patch(model, lf.LofitConfig(scale="all", offset="all")), 0.1)

    def away():
        with prepared(model, INT8):
            got = gradients(model)[1]
        return sum((one - other).norm() / other.norm() for one, other in zip(got, full, strict=True))

    full = gradients(model)[1]
    mixed = away()
    monkeypatch.setattr("lofit_fast.training.engine.frozen_products.outlier_columns", lambda *of: {})
    assert mixed < 0.6 * away()


def test_a_model_that_does_not_run_on_tokens_is_told_and_trains(llama, monkeypatch):
    llama.requires_grad_(False)
    names = [n for n, _ in llama.named_modules()]
    hook = llama.register_forward_pre_hook(needs_pixels, with_kwargs=True)
    state = belongings(llama)
    told = pytest.warns(UserWarning, match=r"not run on tokens alone \(ValueError: no pixels\)")
    with told, prepared(llama, INT8):
        assert all(m.lofit_products.columns is None for m in linears(llama).values())
    assert belongings(llama) == state and [n for n, _ in llama.named_modules()] == names
    hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prepared(llama, INT8):
            pass


def needs_pixels(module, args, kwargs):
    if "pixel_values" not in kwargs:
        raise ValueError("no pixels")
