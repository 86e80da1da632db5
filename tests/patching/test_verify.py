"""The proof of an export: it passes what is right, and nothing that lacks a part of the adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofit_fast as lf
from lofit_fast.patching.verify import check_export
from tests.oracle import randomize
from tests.ordinary_sample import crossed
from tests.patched_models import relative, snapshot
from tests.tiny_models import tiny_model, tokens

BOTH = lf.LofitConfig(scale="all", offset="all")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exported(folder, dtype=torch.float32, std=0.3, config=BOTH, family="llama", **changes):
    model = tiny_model(family, dtype, **changes)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = lf.patch(model, config)
    randomize(handle, std)
    lf.export(handle, folder)
    return handle, base


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_scales(tensors, base, layers=(0, 1, 2)):
    for layer in layers:
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors[name] = base[name]


def without_offsets(tensors, base, layers=(0, 1, 2)):
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.o_proj.bias"].zero_()


FAULTS = {
    "scales": without_scales,
    "offsets": without_offsets,
    "scales of one layer": lambda tensors, base: without_scales(tensors, base, [1]),
    "offsets of one layer": lambda tensors, base: without_offsets(tensors, base, [2]),
    "one head's scale": lambda tensors, base: tensors["model.layers.0.self_attn.o_proj.weight"][:, :16].copy_(
        base["model.layers.0.self_attn.o_proj.weight"][:, :16]
    ),
    "another embedding": lambda tensors, base: tensors["model.embed_tokens.weight"].mul_(1.5),
    "a bias left out": lambda tensors, base: tensors.pop("model.layers.1.self_attn.o_proj.bias"),
    "a bias too many": lambda tensors, base: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(48)}),
}


# small adapters too, which rounding of the logits would hide in 16 bits
@pytest.mark.parametrize("fault, dtype, std", crossed(list(FAULTS), [(torch.float32, 0.01), (torch.bfloat16, 0.05)]))
def test_a_folder_that_lacks_something_is_no_proof(fault, dtype, std, tmp_path):
    handle, base = exported(tmp_path, dtype, std)
    assert lf.verify_export(handle, tmp_path).difference < 0.02
    rewrite(tmp_path, lambda tensors: FAULTS[fault](tensors, base))
    for proof in (lf.verify_export, check_export):
        with pytest.raises(ValueError, match="does not compute what the patched one does"):
            proof(handle, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("hidden", ["scale", "offset"])
def test_what_rounding_hides_is_inconclusive(hidden, dtype, tmp_path):
    config = lf.LofitConfig(scale="all", offset="all")
    model = tiny_model("llama", dtype, attention_bias=hidden == "offset")
    handle = lf.patch(model, config)
    randomize(handle)
    with torch.no_grad():
        for layer in handle.layers.values():
            # below half a unit in the last place of everything it is added to
            getattr(layer, hidden).mul_(1e-5)
            if hidden == "offset":
                layer.inner.bias.fill_(1.0)
    lf.export(handle, tmp_path)
    with pytest.raises(ValueError, match=f"inconclusive: leaving out the {hidden}s .* Load the base in float32"):
        lf.verify_export(handle, tmp_path)


def test_an_adapter_without_effect_on_these_inputs_is_inconclusive(tmp_path):
    handle, _ = exported(tmp_path, std=1e-12)
    with pytest.raises(ValueError, match="inconclusive: leaving out the scales"):
        lf.verify_export(handle, tmp_path)


def test_vectors_of_zero_have_nothing_to_hide(tmp_path):
    handle, _ = exported(tmp_path, std=0.0)
    assert lf.verify_export(handle, tmp_path).effects == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_verifying_changes_nothing(dtype, tmp_path):
    handle, _ = exported(tmp_path, dtype)
    before = snapshot(handle.model)
    report = lf.verify_export(handle, tmp_path)
    assert snapshot(handle.model) == before
    assert set(report.effects) == {"scale", "offset"}
    # a float32 copy sees nothing but the rounding of the merged weights
    assert report.difference < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


def test_the_effects_are_those_of_one_component_alone(tmp_path):
    handle, _ = exported(tmp_path)
    report = lf.verify_export(handle, tmp_path, tokens())
    with torch.no_grad():
        whole = handle.model(tokens()).logits
        for layer in handle.layers.values():
            layer.scale.zero_()
        without = handle.model(tokens()).logits
    assert abs(report.effects["scale"] - relative(without, whole)) < 1e-5


def test_vectors_that_changed_after_the_export_are_noticed(tmp_path):
    handle, _ = exported(tmp_path)
    with torch.no_grad():
        handle.layers[2].offset[3] += 0.1
    with pytest.raises(ValueError, match="its model.layers.2.self_attn.o_proj.bias is not the merged one"):
        lf.verify_export(handle, tmp_path)


def test_code_that_computes_something_else_is_noticed(tmp_path):
    handle, _ = exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_export(handle, tmp_path) is not None
    with pytest.raises(ValueError, match="does not compute what the patched one does: ExportReport"):
        lf.verify_export(handle, tmp_path)


@pytest.mark.parametrize("inputs", [tokens(), {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}])
def test_inputs_of_ones_own(inputs, tmp_path):
    handle, _ = exported(tmp_path)
    assert lf.verify_export(handle, tmp_path, inputs).difference < 1e-5


def test_inputs_that_the_model_does_not_take(tmp_path):
    handle, _ = exported(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be run on pixels alone"):
        lf.verify_export(handle, tmp_path, {"pixels": torch.zeros(1, 3)})


@pytest.mark.parametrize("scope", ["disabled", "folded"])
def test_inside_a_scope_nothing_is_verified(scope, tmp_path):
    handle, _ = exported(tmp_path)
    with getattr(handle, scope)(), pytest.raises(ValueError, match="leave the scope first"):
        lf.verify_export(handle, tmp_path)
    lf.verify_export(handle, tmp_path)
