"""Checkpoints of the paper's code and of ITI's, written here as they write them, give independent code's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lofit_fast import LofitConfig, export, handle_of, load, patch
from lofit_fast.patching.storage import read_adapter
from tests.oracle import randomize
from tests.patched_models import logits, relative, snapshot
from tests.planted_pickle import Planted
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model


class Attention(nn.Module):
    """What lo-fit adds to an attention module: a parameter per head for the scale, and one for the offset."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn_A = nn.ParameterList([nn.Parameter(torch.zeros(head_dim)) for _ in range(heads)])
        self.attn_v = nn.ParameterList([nn.Parameter(torch.zeros(head_dim)) for _ in range(heads)])


TUNED = {"A": [(0, 0), (0, 3), (2, 1)], "v": [(1, 0), (1, 2), (2, 1)]}


def published(family="llama", heads=HEADS, letters="Av", **changes):
    """(model, tensors): a base with lo-fit's parameters in it, drawn for TUNED, and its whole state dict."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(3)
    for number, layer in enumerate(model.model.layers):
        added = Attention(heads, layer.self_attn.head_dim)
        layer.self_attn.attn_A, layer.self_attn.attn_v = added.attn_A, added.attn_v
        for letter in letters:
            for head, vector in enumerate(getattr(added, f"attn_{letter}")):
                if (number, head) in TUNED[letter]:
                    vector.data = torch.randn(vector.shape, generator=generator) * 0.3
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hooked_logits(model):
    """Head by head before the output projection, as the published forward computes: (A + 1) z + v."""

    def edit(attention):
        def before(module, args):
            z = args[0].clone()
            size = attention.head_dim
            for i, (scale, offset) in enumerate(zip(attention.attn_A, attention.attn_v, strict=True)):
                z[:, :, i * size : (i + 1) * size] = (scale + 1) * z[:, :, i * size : (i + 1) * size] + offset
            return (z, *args[1:])

        return before

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(edit(layer.self_attn)) for layer in model.model.layers]
    try:
        with torch.no_grad():
            return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


def write(folder, tensors, form):
    """A saved model in one of the forms that transformers gives it."""
    folder.mkdir()
    tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "old bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "old bin"])
def test_lofits_checkpoint_gives_its_own_logits(tmp_path, form):
    model, tensors = published()
    expected = hooked_logits(model)
    base = tiny_model("llama")
    handle = load(base, write(tmp_path / "checkpoint-40", tensors, form))
    with torch.no_grad():
        assert relative(logits(base), expected) < 1e-6
        assert relative(logits(tiny_model("llama")), expected) > 1e-2
    assert (handle.config.scale, handle.config.offset) == tuple(tuple(TUNED[letter]) for letter in "Av")
    # and it is an adapter of ours from then on
    again = read_adapter(handle.save(tmp_path / "adapter"))
    assert again.base_digest and again.tensors.keys() == handle.vectors().keys()
    assert all(torch.equal(again.tensors[key], vectors) for key, vectors in handle.vectors().items())


@pytest.mark.parametrize("family, letters", [("gemma", "A"), ("gemma", "v"), ("qwen2", "v")])
def test_one_step_and_other_families(tmp_path, family, letters):
    model, tensors = published(family, letters=letters)
    base = tiny_model(family)
    handle = load(base, write(tmp_path / "saved", tensors, "safetensors"))
    with torch.no_grad():
        assert relative(logits(base), hooked_logits(model)) < 1e-6
    assert [handle.config.scale is None, handle.config.offset is None] == [letters == "v", letters == "A"]


def test_one_more_adapter_beside_another(tmp_path):
    model, tensors = published(letters="v")
    base = tiny_model("llama")
    handle = patch(base, LofitConfig(offset=[(0, 0)]))
    handle.add("theirs", write(tmp_path / "saved", tensors, "safetensors"), strict=True)
    handle.set_active("theirs")
    with torch.no_grad():
        assert relative(logits(base), hooked_logits(model)) < 1e-5


def refuses(path, error, match, model=None):
    model = tiny_model("llama") if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load(model, path)
    assert handle_of(model) is None and snapshot(model) == before


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


ONE = "model.layers.1.self_attn.attn_v.2"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: without(t, ONE), "not whole, or for another model: attn_v of layer 1 is there for 3 heads"),
        (lambda t: {**t, ONE: torch.zeros(HEAD_DIM + 1)}, r"attn_v.2 as \(17,\) torch.float32: expected \(16,\)"),
        (lambda t: {**t, ONE: torch.zeros(HEAD_DIM, dtype=torch.int64)}, "expected .* floating numbers"),
        (lambda t: {**t, ONE: torch.full((HEAD_DIM,), torch.nan)}, "offset of layer 1 has numbers that are not finite"),
        (lambda t: {**t, "model.layers.9.self_attn.attn_v.0": torch.zeros(HEAD_DIM)}, "for another model: it has"),
        (lambda t: {**t, "model.layers.0.self_attn.attn_v.4": torch.zeros(HEAD_DIM)}, "is there for 5 heads"),
        (lambda t: {n: x * 0 if "attn_" in n else x for n, x in t.items()}, "all of its vectors are zero"),
        (lambda t: {n: x for n, x in t.items() if "attn_" not in n}, "holds no adapter: expected adapter_config.json"),
    ],
)
def test_what_is_no_whole_checkpoint(tmp_path, change, match):
    _, tensors = published()
    refuses(write(tmp_path / "saved", change(tensors), "safetensors"), ValueError, match)


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    torch.save({"model.layers.0.self_attn.attn_A.0": Planted(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refuses(folder, ValueError, "pickle of more than tensors, which could run code, so it is not opened")
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    refuses(folder, ValueError, "holds no tensors by name")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_of_weights(tmp_path):
    _, tensors = published()
    folder = write(tmp_path / "saved", tensors, "shards")
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "away.safetensors")
    refuses(folder, FileNotFoundError, "is not whole: model-00002-of-00002.safetensors is missing")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\x08" * 40)
    refuses(folder, ValueError, "model-00002-of-00002.safetensors cannot be read")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))
    refuses(folder, ValueError, "names the file '../away.safetensors': expected a file of weights beside it")


def test_another_base_is_said(tmp_path):
    _, tensors = published()
    folder = write(tmp_path / "saved", tensors, "safetensors")
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="was made from another base than this model.*o_proj.weight"):
        load(other, folder, strict=True)
    assert handle_of(other) is None
    with pytest.warns(UserWarning, match="made from another base") as warned:
        load(other, folder)
    assert warned[0].filename == __file__
    # of the same checkpoint in half precision nothing is said
    load(tiny_model("llama", torch.bfloat16), folder, strict=True)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_biases_that_offsets_were_merged_into(tmp_path, dtype, limit):
    plain = tiny_model("llama", attention_bias=True)
    base = tiny_model("llama")
    heads = {(0, 1), (2, 0), (2, 3)}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        plain.load_state_dict(base.state_dict(), strict=False)
        for layer, block in enumerate(plain.model.layers):
            vectors = torch.zeros(HEADS, HEAD_DIM)
            for head in (head for number, head in heads if number == layer):
                vectors[head] = torch.randn(HEAD_DIM, generator=generator)
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(block.self_attn, name).bias.zero_()
            block.self_attn.o_proj.bias.copy_((block.self_attn.o_proj.weight @ vectors.flatten()).to(dtype))
        expected = logits(plain)
    state = {
        name: tensor.to(dtype) if name.endswith("o_proj.bias") else tensor
        for name, tensor in plain.state_dict().items()
    }
    handle = load(base, write(tmp_path / "plain", state, "safetensors"))
    with torch.no_grad():
        assert relative(logits(base), expected) < limit
        assert relative(logits(tiny_model("llama")), expected) > 10 * limit
    assert handle.config.scale is None and {layer for layer, _ in handle.config.offset} == {0, 2}


def test_biases_are_solved_for_in_the_weights_that_they_were_made_of(tmp_path):
    # more outputs than inputs, so that one v alone gives a bias
    shape = {"hidden_size": 96}
    handle = patch(tiny_model("llama", **shape), LofitConfig(offset=[(1, 2)]))
    randomize(handle)
    merged = export(handle, tmp_path / "merged")
    vectors = [rows.clone() for rows in handle.vectors().values()]
    # the base is read in fewer digits than the checkpoint has
    rounded = tiny_model("llama", torch.bfloat16, **shape)
    found = load(rounded, merged)
    assert found.config.offset == ((1, 2),)
    for got, expected in zip(found.vectors().values(), vectors, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_that_no_offset_gives(tmp_path):
    # fewer inputs than outputs, so that W v is not everything
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1}
    state = tiny_model("llama", attention_bias=True, **shape).state_dict()
    state["model.layers.1.self_attn.o_proj.bias"] = torch.randn(32, generator=torch.Generator().manual_seed(2))
    folder = write(tmp_path / "plain", state, "safetensors")
    refuses(folder, ValueError, "layers.1.*is no offset of heads", tiny_model("llama", **shape))


def test_what_lofit_saves_is_what_is_written_here(tmp_path):
    names = load_file(write(tmp_path / "saved", published()[1], "safetensors") / "model.safetensors").keys()
    expected = {
        f"model.layers.{layer}.self_attn.attn_{letter}.{head}"
        for layer in range(LAYERS)
        for letter in "Av"
        for head in range(HEADS)
    }
    assert {name for name in names if "attn_" in name and "self_attn.attn" in name} == expected
