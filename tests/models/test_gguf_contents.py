"""GGUF files of which transformers leaves out a part without a word: loaded whole, or refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gguf")
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lofit_fast.models.gguf_contents import GgufContents
from lofit_fast.models.load import load_model
from tests.tiny_gguf import tensors_of, write_tiny_gguf
from tests.tiny_models import HEAD_DIM, tiny_model, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))


def with_biases(wanted, **changes):
    """A tiny Llama with numbers in the biases whose names end so, and its tensors without the others."""
    model = tiny_model("llama", attention_bias=True, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(wanted):
            torch.nn.init.normal_(parameter)
    arrays = tensors_of(model)
    return model, {name: array for name, array in arrays.items() if array.any() or not name.endswith(".bias")}


@torch.no_grad()
def assert_same(path, model):
    loaded, _ = load_model(str(path), dtype="float32", device="cpu")
    assert loaded(tokens()).logits.equal(model(tokens()).logits)
    return loaded


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        (("o_proj.bias",), {}),
        pytest.param(("q_proj.bias", "k_proj.bias", "v_proj.bias"), {}, marks=pytest.mark.slow),
        ((".bias",), {"mlp_bias": True}),
    ],
    ids=["output", "queries and keys", "all"],
)
def test_biases_are_loaded(tmp_path, wanted, changes):
    model, arrays = with_biases(wanted, **changes)
    path = write_tiny_gguf(tmp_path / "biased.gguf", model, tensors=arrays)
    assert assert_same(path, model).config.attention_bias is True


def test_scaled_positions_are_loaded(tmp_path):
    linear = tiny_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    entries = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert_same(write_tiny_gguf(tmp_path / "linear.gguf", linear, entries=entries), linear)
    scaled = tiny_model("llama", rope_parameters=LLAMA3)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled.config, "cpu")
    plain = 10000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    factors = (plain / frequencies.numpy()).astype(np.float32)
    path = write_tiny_gguf(tmp_path / "llama3.gguf", scaled, {"rope_freqs.weight": factors})
    assert assert_same(path, scaled).config.rope_parameters == LLAMA3


ONES = np.ones(HEAD_DIM // 2, np.float32)
REFUSED = {
    "other factors": ({"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}, {}, "rope_freqs.weight"),
    "long factors": ({"rope_factors_long.weight": ONES}, {}, "rope_factors_long.weight"),
    "a norm of queries": ({"blk.0.attn_q_norm.weight": ONES}, {}, "1 of its tensors .blk.0.attn_q_norm.weight."),
    "a norm's bias": ({"blk.1.attn_norm.bias": ONES}, {}, "blk.1.attn_norm.bias"),
    "yarn": ({}, {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn'"),
    "another scale": ({}, {"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_do_is_refused(tmp_path, case):
    more, entries, said = REFUSED[case]
    path = write_tiny_gguf(tmp_path / "odd.gguf", tiny_model("llama"), more, entries)
    with pytest.raises(ValueError, match=said) as error:
        load_model(str(path), dtype="float32", device="cpu")
    assert str(path) in str(error.value)
    assert not list((tmp_path / "cache").glob("odd*"))


def test_a_config_that_scales_its_positions_already_is_left_as_it_is(tmp_path):
    rope = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    config = SimpleNamespace(model_type="gemma4_text", rope_parameters=rope)
    contents = GgufContents(tmp_path / "x.gguf", "gemma4", {}, (), torch.tensor([1.0, 1e30], dtype=torch.float64))
    assert contents._with_rope(config).rope_parameters == rope


def test_another_family_has_no_place_for_the_bias(tmp_path):
    model, arrays = with_biases(("o_proj.bias",))
    arrays |= {
        f"blk.{n}.attn_{part}.bias": np.ones(64 if part == "q" else 32, np.float32) for n in range(3) for part in "qkv"
    }
    path = write_tiny_gguf(tmp_path / "qwen2.gguf", model, tensors=arrays, architecture="qwen2")
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no place"):
        load_model(str(path), dtype="float32", device="cpu")


def test_factors_of_one_and_a_missing_tensor(tmp_path):
    model = tiny_model("llama")
    assert_same(write_tiny_gguf(tmp_path / "ones.gguf", model, {"rope_freqs.weight": ONES}), model)
    arrays = {name: array for name, array in tensors_of(model).items() if name != "blk.1.ffn_up.weight"}
    path = write_tiny_gguf(tmp_path / "lacking.gguf", model, tensors=arrays)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(path), dtype="float32", device="cpu")
