"""Bases that merging cannot write into: refused before anything changes, and the handle lives on."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching.stock_peft import export_peft
from tests.oracle import randomize
from tests.patched_models import HOOKS, logits
from tests.tiny_models import tiny_model, tokens


class Quantized(nn.Linear):
    """A linear with a forward of its own."""


class Packed(torch.Tensor):
    """A tensor that stands for other numbers, as torchao's, DTensor and bitsandbytes' do."""


def inner(model, layer=1):
    return model.model.layers[layer].self_attn.o_proj.inner


def another_class(model):
    inner(model).__class__ = Quantized


def a_tensor_subclass(model):
    linear = inner(model)
    linear._parameters["weight"] = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)


def of_dtype(dtype):
    def change(model):
        linear = inner(model)
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)

    return change


def on_meta(model):
    linear = inner(model)
    linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)


def sharded(model):
    linear = inner(model)
    linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(inner(model))


def computed_by_a_hook(model):
    linear = inner(model)
    weight = linear.weight.detach()
    del linear._parameters["weight"]
    linear.weight = weight


def a_hook_before(model):
    inner(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def a_hook_after(model):
    inner(model).register_forward_hook(lambda module, args, output: output * 2)


def shown(model, layer=1):
    """What a user finds by the projection's name."""
    return model.model.layers[layer].self_attn.o_proj


def a_hook_before_ours(model):
    shown(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def a_hook_after_ours(model):
    shown(model).register_forward_hook(lambda module, args, output: output * 2)


def a_hook_on_our_gradients(model):
    shown(model).register_full_backward_hook(lambda module, inputs, outputs: None)


def another_forward_of_ours(model):
    ours = shown(model).forward
    shown(model).forward = lambda z: ours(z) * 2


def one_that_accelerate_wraps(model):
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    another_forward_of_ours(model)
    add_hook_to_module(shown(model), AlignDevicesHook("cpu"))


def a_forward_of_its_own(model):
    linear = inner(model)
    linear.forward = lambda z: nn.functional.linear(z.relu(), linear.weight)


def expanded(model):
    linear = inner(model)
    linear.weight = nn.Parameter(linear.weight.detach()[:, :1].expand(-1, 64), requires_grad=False)


def made_in_inference_mode(model):
    linear = inner(model)
    with torch.inference_mode():
        weight = linear.weight.detach().clone()
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def one_weight_in_two_places(model):
    inner(model).weight = inner(model, 0).weight


def one_module_in_two_places(model):
    model.model.layers[1].self_attn.o_proj.inner = inner(model, 0)


def packed_beside(model):
    attention = model.model.layers[2].self_attn
    attention.k_proj.__class__ = Quantized


def a_weight_that_overflows(model):
    linear = inner(model)
    linear.weight = nn.Parameter(linear.weight.detach().half().fill_(6e4), requires_grad=False)


# kind -> (change of a patched model, what the refusal of merge() names)
KINDS = {
    "another class": (another_class, "layer 1: expected a plain nn.Linear, got Quantized"),
    "a tensor subclass": (a_tensor_subclass, "layer 1: .* got Linear whose weight is a Packed"),
    "int8": (of_dtype(torch.int8), r"got Linear whose weight is quantized \(torch.int8\)"),
    "fp8": (of_dtype(torch.float8_e4m3fn), "got Linear whose weight is quantized"),
    "on meta": (on_meta, "got Linear whose weight is not in memory"),
    "sharded": (sharded, "cannot merge a sharded model: found"),
    "parametrized": (parametrized, "layer 1: expected a plain nn.Linear, got Parametrized"),
    "computed by a hook": (computed_by_a_hook, "got Linear whose weight is computed"),
    "a hook before": (a_hook_before, "got Linear with forward hooks"),
    "a hook after": (a_hook_after, "got Linear with forward hooks"),
    "a forward of its own": (a_forward_of_its_own, "got Linear with a forward of its own"),
    "a hook before ours": (a_hook_before_ours, "layer 1: its projection, LoFiT's module, has forward pre-hooks on it"),
    "a hook after ours": (a_hook_after_ours, "layer 1: .* has forward hooks on it"),
    "gradients of ours": (a_hook_on_our_gradients, "layer 1: .* has backward hooks on it"),
    "another forward of ours": (another_forward_of_ours, "layer 1: .* has a forward of its own"),
    "one that accelerate wraps": (one_that_accelerate_wraps, "layer 1: .* has a forward of its own"),
    "expanded": (expanded, "got Linear whose weight is one number seen many times"),
    "inference mode": (made_in_inference_mode, "layer 1: its weights were made in inference mode"),
    "one weight in two places": (one_weight_in_two_places, "layer 0: its projection's weights are used in several"),
    "one module in two places": (one_module_in_two_places, "layer 0: its projection's weights are used in several"),
    "packed beside": (packed_beside, "model.layers.2.self_attn.k_proj needs a bias of zeros .* got Quantized"),
    "overflow": (a_weight_that_overflows, "layer 1: the merged numbers overflow torch.float16"),
}
# stock code loads what these hold as well
EXPORTED_ANYWAY = ("inference mode", "one weight in two places", "packed beside")


def bits(model):
    """Everything that merging could change, whatever kind of tensor it is in."""
    seen = {"config": repr(model.config.to_dict())}
    for name, module in model.named_modules():
        seen[name] = (id(module), type(module), module.training, [list(getattr(module, kind)) for kind in HOOKS])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        there = tensor.device.type != "meta"
        raw = tensor.detach().as_subclass(torch.Tensor).contiguous().view(-1)
        content = raw.view(torch.uint8).numpy().tobytes() if there else None
        seen[f"tensor {name}"] = (id(tensor), tensor.requires_grad, content)
    return seen


def patched(kind):
    # frozen, since integers want no gradient back
    handle = lf.patch(tiny_model("llama").requires_grad_(False), lf.LofitConfig(scale="all", offset="all"))
    randomize(handle)
    with torch.no_grad():
        # above zero, so that what is nearly too large becomes too large
        for layer in handle.layers.values():
            layer.scale.abs_()
    KINDS[kind][0](handle.model)
    return handle


def outcome(model):
    """Its logits, or the sentence of the error that it gives."""
    try:
        with torch.no_grad():
            return model(tokens()).logits
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_merge_leaves_model_and_handle_as_they_were(kind):
    handle = patched(kind)
    before, computed = bits(handle.model), outcome(handle.model)
    with pytest.raises(ValueError, match=KINDS[kind][1]):
        handle.merge()
    assert bits(handle.model) == before
    after = outcome(handle.model)
    assert torch.equal(after, computed) if torch.is_tensor(computed) else after == computed
    handle.check_live()
    assert lf.handle_of(handle.model) is handle
    with pytest.warns(UserWarning, match="unpatching drops") if "ours" in kind or "wraps" in kind else nullcontext():
        handle.unpatch()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXPORTED_ANYWAY])
def test_a_refused_export_leaves_no_folder(kind, tmp_path):
    handle = patched(kind)
    before = bits(handle.model)
    with pytest.raises(ValueError, match="cannot (merge layer|export layer|export a sharded model)"):
        lf.export(handle, tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    assert bits(handle.model) == before


@pytest.mark.parametrize("kind", EXPORTED_ANYWAY)
def test_what_cannot_be_written_in_place_exports(kind, tmp_path):
    handle = patched(kind)
    lf.export(handle, tmp_path)
    assert lf.verify_export(handle, tmp_path).difference < 1e-5


def elsewhere(change):
    model = tiny_model("llama")
    change(model)
    handle = lf.patch(model, lf.LofitConfig(scale="all"))
    randomize(handle)
    return handle


def int8_mlp(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def meta_mlp(model):
    model.model.layers[0].mlp.up_proj.to("meta")


def more_than_stock(model):
    model.model.layers[0].mlp.up_proj.register_buffer("scales", torch.ones(3))


def less_than_stock(model):
    model.model.layers[0].mlp.up_proj = nn.Identity()


def another_shape(model):
    model.lm_head = nn.Linear(32, 100, bias=False)


# what is no part of merging, but of the folder
ELSEWHERE = {
    int8_mlp: "model.layers.0.mlp.up_proj.weight is quantized",
    meta_mlp: "model.layers.0.mlp.up_proj.weight is not in memory",
    more_than_stock: "the model has a model.layers.0.mlp.up_proj.scales, which LlamaForCausalLM lacks",
    less_than_stock: "LlamaForCausalLM has a model.layers.0.mlp.up_proj.weight, which this model lacks",
    another_shape: r"lm_head.weight is of shape \(100, 32\), by the model's config \(97, 32\)",
}


@pytest.mark.parametrize("change", ELSEWHERE)
def test_export_of_what_stock_code_does_not_build_is_refused(change, tmp_path):
    handle = elsewhere(change)
    before = bits(handle.model)
    with pytest.raises(ValueError, match=f"cannot export: {ELSEWHERE[change]}"):
        lf.export(handle, tmp_path / "out")
    assert bits(handle.model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_device_hook_of_accelerate_is_no_obstacle(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn.o_proj, AlignDevicesHook("cpu"))
    handle = lf.patch(model, lf.LofitConfig(scale="all", offset="all"))
    randomize(handle)
    expected = logits(model)
    lf.export(handle, tmp_path)
    assert lf.verify_export(handle, tmp_path).difference < 1e-5
    torch.testing.assert_close(logits(handle.merge()), expected)


def test_a_device_hook_on_ours_is_no_obstacle():
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    handle = elsewhere(lambda model: None)
    for layer in handle.layers.values():
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    # what was taken off leaves a forward, which is the class's own
    remove_hook_from_module(handle.layers[0])
    expected = logits(handle.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = handle.merge()
    torch.testing.assert_close(logits(merged), expected)


def test_a_removed_hook_is_no_obstacle():
    handle = elsewhere(lambda model: None)
    hook = shown(handle.model).register_forward_hook(lambda module, args, output: output * 2)
    for refused in (handle.merge, lambda: export_peft(handle, "nowhere")):
        with pytest.raises(ValueError, match="layer 1: .* has forward hooks on it"):
            refused()
    hook.remove()
    expected = logits(handle.model)
    torch.testing.assert_close(logits(handle.merge()), expected)


def test_a_hook_where_another_adapter_is_active_is_refused(tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    handle.save(tmp_path)
    handle.add("second", tmp_path)
    handle.set_active("second")
    a_hook_after_ours(handle.model)
    with pytest.raises(ValueError, match="cannot merge layer 1: .* has forward hooks on it"):
        handle.merge()


def test_a_model_that_was_dequantized_exports_as_a_plain_one(tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    randomize(handle)
    lf.export(handle, tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert lf.verify_export(handle, tmp_path).difference < 1e-5


FOLDERS = {
    "adapter_config.json": "holds an adapter",
    "model-00001-of-00002.safetensors": "holds weights of another model",
    "pytorch_model.bin": "holds weights of another model",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_export_into_a_folder_of_something_else_is_refused(name, tmp_path):
    (tmp_path / name).write_text("theirs")
    handle = elsewhere(lambda model: None)
    with pytest.raises(ValueError, match=FOLDERS[name]):
        lf.export(handle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_export_over_the_base_is_refused(tmp_path):
    import transformers

    tiny_model("llama").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    handle = lf.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), lf.LofitConfig(scale="all"))
    with pytest.raises(ValueError, match="is the folder of the base model, which would be lost"):
        lf.export(handle, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_exporting_twice_replaces_the_first(tmp_path):
    handle = elsewhere(lambda model: None)
    lf.export(handle, tmp_path)
    randomize(handle, seed=8)
    lf.export(handle, tmp_path)
    assert lf.verify_export(handle, tmp_path).difference < 1e-5


def test_a_class_that_wants_more_than_its_config_merges_in_memory_alone(tmp_path):
    import transformers

    class Odd(transformers.LlamaForCausalLM):
        """Not to be built by stock code."""

        def __init__(self, config, more):
            super().__init__(config)

    handle = lf.patch(Odd(tiny_model("llama").config, 1).eval(), lf.LofitConfig(scale="all"))
    with pytest.raises(ValueError, match="Odd cannot be built from its config"):
        lf.export(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    handle.unpatch()
    handle = lf.patch(handle.model, lf.LofitConfig(scale="all", offset="all"))
    randomize(handle)
    expected = logits(handle.model)
    with pytest.warns(UserWarning, match="right in memory"):
        torch.testing.assert_close(logits(handle.merge()), expected)


def test_a_copy_merges_without_the_original():
    handle = elsewhere(lambda model: None)
    expected, twin = logits(handle.model), copy.deepcopy(handle.model)
    torch.testing.assert_close(logits(lf.handle_of(twin).merge()), expected)
    assert torch.equal(logits(handle.model), expected)
