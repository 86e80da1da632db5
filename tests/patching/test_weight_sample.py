"""A base named by a sample of its weights: every tensor counts, rounding and adapters do not."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.models.base_digest import base_digest, same_base
from lofit_fast.patching import weight_sample
from tests.oracle import randomize
from tests.packed_linears import KINDS, packed_model
from tests.tiny_models import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


@torch.no_grad()
def test_a_change_of_any_tensor_is_another_base(model):
    before = base_digest(model)
    for _, parameter in model.named_parameters():
        number = parameter.view(-1)[-3]
        kept = number.clone()
        number += 0.5
        assert same_base(base_digest(model), before) is False
        number.copy_(kept)
    assert base_digest(model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"])
def test_a_row_or_a_column_of_a_large_tensor_is_noticed(name, model, monkeypatch):
    monkeypatch.setattr(weight_sample, "WHOLE", 10)
    weight, before = model.get_submodule(name).weight, base_digest(model)
    for part in (weight[0], weight[-1], weight[1], weight[:, 0], weight[:, 1], weight[:, -1]):
        kept = part.clone()
        part += 0.5
        assert same_base(base_digest(model), before) is False
        part.copy_(kept)
    assert base_digest(model) == before


def in_dtype(*dtypes) -> str:
    model = tiny_model("llama")
    for dtype in dtypes:
        model.to(dtype)
    return base_digest(model)


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# how a checkpoint was loaded, twice -> whether they are one base
LOADED = {
    "float32 and its rounding": ((F32,), (BF16,), True),
    "float32 and its other rounding": ((F32,), (F16,), True),
    "float64": ((F32,), (F64,), True),
    "a bfloat16 checkpoint": ((BF16, F32), (BF16,), True),
    "a float16 checkpoint in bfloat16": ((F16,), (F16, BF16), True),
    "two roundings": ((BF16,), (F16,), None),
}


@pytest.mark.parametrize("case", LOADED)
def test_the_dtype_that_a_base_is_loaded_in_does_not_matter(case):
    first, second, same = LOADED[case]
    assert same_base(in_dtype(*first), in_dtype(*second)) is same
    assert same_base(in_dtype(*second), in_dtype(*first)) is same


def test_a_decoder_without_its_head_is_the_same_base(model):
    assert same_base(base_digest(model), base_digest(model.model)) is True
    other = copy.deepcopy(model)
    nn.init.normal_(other.lm_head.weight)
    assert same_base(base_digest(model), base_digest(other)) is False
    assert same_base(base_digest(model.model), base_digest(other)) is True


def test_vectors_in_the_model_do_not_matter(model):
    before = base_digest(model)
    handle = lf.patch(model, lf.LofitConfig(scale="all", offset=[(1, 2)]))
    randomize(handle)
    assert base_digest(model) == before
    handle.unpatch()
    assert base_digest(model) == before
    lf.patch(model, lf.LofitConfig(scale="all")).merge()
    assert same_base(base_digest(model), before) is False


def test_adapters_of_peft_do_not_matter(model):
    peft = pytest.importorskip("peft")
    import lofit_fast.peft as bridge

    before = base_digest(model)
    lora = peft.LoraConfig(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"])
    tokens = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    for config in (lora, tokens, bridge.LofitPeftConfig(offset="all")):
        assert base_digest(peft.get_peft_model(copy.deepcopy(model), config)) == before
    lf.patch(model, lf.LofitConfig(offset="all"))
    assert base_digest(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))) == before


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bases_cannot_be_told_from_plain_ones(kind, model):
    digest = base_digest(packed_model(KINDS[kind]))
    assert base_digest(packed_model(KINDS[kind])) == digest
    other = base_digest(packed_model(KINDS[kind], seed=1))
    assert same_base(digest, base_digest(model)) is None
    # their heads are plain
    assert same_base(digest, other) is False


def test_weights_that_are_not_here_cannot_tell(model):
    whole = base_digest(model)
    model.model.layers[1].to("meta")
    assert same_base(base_digest(model), whole) is None
    assert same_base(base_digest(model.to("meta")), whole) is None


@pytest.fixture
def folder(tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    randomize(handle)
    return handle.save(tmp_path)


def test_an_adapter_on_other_weights_is_a_warning_that_names_both(folder, model):
    other = tiny_model("llama", seed=1)
    with pytest.warns(UserWarning, match="was trained on other weights than this model has") as caught:
        lf.load(other, folder)
    (warning,) = caught
    assert all(digest in str(warning.message) for digest in (base_digest(model), base_digest(other), str(folder)))
    assert warning.filename == __file__


def test_strict_refuses_it_and_changes_nothing(folder):
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="was trained on other weights than this model has"):
        lf.load(other, folder, strict=True)
    assert lf.handle_of(other) is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_base_in_any_dtype_is_no_warning(folder, dtype, strict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.load(tiny_model("llama", dtype), folder, strict=strict)
