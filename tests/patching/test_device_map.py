"""Models that accelerate spreads over devices or keeps offloaded: the fused path stays, and with it small scales."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, vectors_of
from lofit_fast.patching.placement import moving_hook
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_kernels import aten
from tests.oracle import randomize
from tests.tiny_models import LAYERS, tiny_model, tokens

pytest.importorskip("accelerate")

CONFIG = lf.LofitConfig(scale=[(0, 0), (1, 2)], offset=[(0, 1), (1, 0), (2, 3)])
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def resident(model, folder):
    from accelerate import dispatch_model

    places = {**dict.fromkeys(PARTS, "cpu"), **{f"model.layers.{n}": "cpu" for n in range(LAYERS)}}
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def offloaded(model, folder):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def on_disk(model, folder):
    from accelerate import disk_offload

    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def mixed(model, folder):
    from accelerate import dispatch_model

    places = {**dict.fromkeys(PARTS, "cpu"), **{f"model.layers.{n}": "disk" if n else "cpu" for n in range(LAYERS)}}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


SPREAD = {"resident": resident, "offloaded": offloaded, "disk": on_disk, "mixed": mixed}
HELD = ("resident", "offloaded")


@pytest.fixture
def build(tmp_path):
    def build(spread=None, dtype=torch.float32, config=CONFIG):
        model = tiny_model("llama", dtype)
        handle = lf.patch(model if spread is None else SPREAD[spread](model, tmp_path / "weights"), config)
        randomize(handle)
        return model, handle

    return build


def run(model, parameters):
    ids = tokens()
    loss = model(input_ids=ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize(
    ("spread", "dtype"),
    [*product(HELD, (torch.float32, torch.bfloat16)), ("disk", torch.float32), ("mixed", torch.float32)],
)
def test_a_spread_model_computes_what_it_computes_in_one_place(spread, dtype, build):
    (model, handle), (plain, expected) = build(spread, dtype), build(dtype=dtype)
    assert all(moving_hook(layer.inner) is not None for layer in handle.layers.values())
    got, wanted = run(model, list(handle.parameters())), run(plain, list(expected.parameters()))
    # to the last bit: it is the same path
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    with torch.no_grad(), handle.folded():
        folded = model(tokens()).logits
    with torch.no_grad(), expected.folded():
        torch.testing.assert_close(folded, plain(tokens()).logits)


@pytest.mark.parametrize("spread", HELD)
def test_a_spread_model_equals_an_independent_hook(spread, build):
    model, handle = build(spread, torch.float64)
    got = run(model, list(handle.parameters()))
    plain = tiny_model("llama", torch.float64)
    hook = HookLofit(plain, vectors_of(handle), torch.float64)
    parameters = [hook.parameters[int(n.split(".")[0]), n.split(".")[1]] for n, _ in handle.named_parameters()]
    for g, w in zip(got, run(plain, parameters), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("spread", HELD)
def test_a_spread_model_keeps_small_scales_in_16_bits(spread, build):
    model, handle = build(spread, torch.bfloat16, lf.LofitConfig(scale=[(1, 2)]))
    layer = handle.layers[1]
    nn.init.constant_(layer.scale, 1e-3)
    z = torch.randn(64, layer.in_features).bfloat16()
    with handle.disabled():
        base = layer(z)
    # below half of what survives in (1 + a) z: the adapter alone, rounded before the product, would be the base exactly
    assert not torch.equal(layer(z), base)


def test_a_spread_model_is_folded_once(monkeypatch, build):
    seen = []
    folded = aten.grouped_fold
    monkeypatch.setattr(aten, "grouped_fold", lambda *of: seen.append(len(of[0])) or folded(*of))
    model, handle = build("resident")
    run(model, list(handle.parameters()))
    assert seen == [3]


def test_an_offloaded_weight_is_gone_after_its_forward(build):
    model, handle = build("offloaded")
    run(model, list(handle.parameters()))
    assert all(layer.inner.weight.is_meta for layer in handle.layers.values())


def replaced_since(linear):
    forward = linear.forward
    linear.forward = lambda z: 2 * forward(z)


def replaced_before(linear):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(linear)
    forward = linear.forward
    linear.forward = lambda z: 2 * forward(z)
    add_hook_to_module(linear, AlignDevicesHook("cpu"))


def another_hook(linear):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(linear, Doubling(), append=True)


def listened_to(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [replaced_since, replaced_before, another_hook, listened_to])
def test_whatever_else_is_on_a_projection_is_obeyed(change, build):
    model, handle = build("resident")
    layer = handle.layers[0]
    z = torch.randn(5, layer.in_features)
    before = layer(z)
    change(layer.inner)
    torch.testing.assert_close(layer(z), 2 * before)


def test_a_copy_of_a_spread_model_moves_its_own():
    linear = resident(tiny_model("llama"), None).model.layers[0].self_attn.o_proj
    twin = copy.deepcopy(linear)
    assert moving_hook(linear) is not None
    # the copy's forward runs the copy, or it is not taken for one
    assert moving_hook(twin) is None or twin.forward.args == (twin,)


def test_a_plain_linear_has_no_moving_hook():
    assert moving_hook(nn.Linear(2, 2)) is None
    assert is_plain_linear(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "spread", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("offloaded", "disk"))]
)
def test_an_offloaded_model_is_saved_and_comes_back_and_is_not_merged(spread, build, tmp_path):
    from accelerate.hooks import remove_hook_from_submodules

    (model, handle), (plain, expected) = build(spread), build()
    for do in (handle.merge, lambda: lf.export(handle, tmp_path / "plain")):
        with pytest.raises(ValueError, match=r"cannot merge layer \d: .* not in memory \(offloaded"):
            do()
    assert torch.equal(lf.head_scores(handle), lf.head_scores(expected))
    for one, folder in ((handle, "spread"), (expected, "alone")):
        one.save(tmp_path / folder)
    tensors = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("spread", "alone")]
    assert tensors[0][-256:] == tensors[1][-256:]
    with torch.no_grad():
        wanted = plain(tokens()).logits
        # the weights are where they were, and what brought them is gone
        remove_hook_from_submodules(model)
        torch.testing.assert_close(model(tokens()).logits, wanted)
        handle.unpatch()
        lf.load(model, tmp_path / "spread")
        torch.testing.assert_close(model(tokens()).logits, wanted)


@pytest.mark.parametrize("spread", ["offloaded", "disk"])
def test_a_patched_model_is_not_offloaded(spread, build, tmp_path):
    model, handle = build()
    with pytest.raises(ValueError, match="cannot offload a patched model.*offload it, and patch it then"):
        SPREAD[spread](model, tmp_path / "weights")


def test_a_model_that_is_spread_after_the_patch_computes_the_same(build):
    (model, handle), (plain, expected) = build(), build()
    got = run(resident(model, None), list(handle.parameters()))
    assert all(torch.equal(g, w) for g, w in zip(got, run(plain, list(expected.parameters())), strict=True))


def test_a_layer_that_is_offloaded_as_a_whole_is_refused():
    from accelerate import cpu_offload

    model = tiny_model("llama")
    cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=["LlamaAttention"])
    with pytest.raises(ValueError, match="a LlamaAttention is offloaded as a whole.*without preload_module_classes"):
        lf.patch(model, CONFIG)
    model(tokens())


@pytest.mark.slow
def test_an_offloaded_model_is_fitted_like_another(tmp_path):
    from tests.training.tiny_runs import QUICK, fit

    fitted = [
        fit(model, tmp_path / name, QUICK)
        for name, model in (("spread", offloaded(tiny_model("llama"), None)), ("alone", tiny_model("llama")))
    ]
    assert fitted[0].heads == fitted[1].heads
    for got, wanted in zip(*(one.handle.parameters() for one in fitted), strict=True):
        assert torch.equal(got, wanted)
