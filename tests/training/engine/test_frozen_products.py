"""The scope of quantized products: what it takes, what it refuses, where it computes in full, and that it leaves."""

import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import encode
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.frozen_linear import products_of
from lofit_fast.sealed import read_sealed, write_sealed
from lofit_fast.tasks.task import Preference
from lofit_fast.training.engine import Engine, frozen_products, prepared
from lofit_fast.training.engine.auto import settle
from lofit_fast.training.engine.frozen_products import settled_products
from lofit_kernels.quantized_linear import FrozenWeight, quantized_linear
from tests.oracle import Hook, randomize, vectors_of
from tests.tiny_families import tiny_family
from tests.tiny_models import LAYERS, tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.engine.engine_effects import belongings, gradients
from tests.training.tiny_runs import HELD_OUT, fit

INT8 = Engine(frozen_products="int8")
# q, k, v, o, gate, up, down
LINEARS = 7


def patched(family="llama", dtype=torch.float32, **config):
    model = tiny_model(family, dtype)
    randomize(lf.patch(model, lf.LofitConfig(**(config or {"scale": "all", "offset": "all"}))), 0.1)
    return model


def test_every_frozen_linear_is_taken_in_a_pass_with_a_graph_alone(llama):
    handle = lf.patch(llama, lf.LofitConfig(scale="all"))
    randomize(handle, 0.1)
    full, full_gradients = gradients(llama)
    with prepared(llama, INT8):
        taken = [m for layer in decoder_layers(llama) for m in layer.modules() if products_of(m) is not None]
        assert len(taken) == LAYERS * LINEARS
        loss, got = gradients(llama)
        assert 0 < abs(loss - full) < 2e-2 * full
        assert all(not m.lofit_products.packed(False)[0].dtype.is_floating_point for m in taken)
        with torch.no_grad():
            assert llama(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.item() == full
    assert gradients(llama)[0] == full
    for one, other in zip(got, full_gradients, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["self_attn.o_proj.inner", "mlp.up_proj"])
@pytest.mark.parametrize("adapted", ["scale", "offset"])
def test_a_weight_that_is_trained_by_now_has_its_gradient(llama, adapted, name):
    handle = lf.patch(llama, lf.LofitConfig(**{adapted: "all"}))
    randomize(handle, 0.1)
    # of the last layer, where what the others round reaches the gradient least
    linear, ids = llama.model.layers[-1].get_submodule(name), tokens(2, 9)

    def gradient():
        (found,) = torch.autograd.grad(llama(input_ids=ids, labels=ids, use_cache=False).loss, linear.weight)
        return found

    with linear_trained(linear):
        expected = gradient()
    with prepared(llama, INT8):
        x = torch.randn(3, linear.in_features)
        in_8_bits = linear(x)
        with linear_trained(linear):
            assert torch.cosine_similarity(gradient().flatten(), expected.flatten(), dim=0) > 0.98
            assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))
        # frozen again, it is in 8 bits again
        assert torch.equal(linear(x), in_8_bits)


@contextmanager
def linear_trained(linear):
    linear.weight.requires_grad_(True)
    yield
    linear.weight.requires_grad_(False)


class Emulated(torch.autograd.Function):
    """A product of rounded numbers in float64, each direction with roundings of its own; y's `kept` columns exact."""

    @staticmethod
    def forward(ctx, x, weight, kept):
        ctx.save_for_backward(weight)
        rest, others = x.clone(), weight.detach().clone()
        rest[..., kept] = others[:, kept] = 0
        y = rounded(rest, 127.0) @ rounded(others, weight_top()).t()
        return (y + x[..., kept].double() @ weight[:, kept].double().t()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (rounded(grad, 127.0) @ rounded(weight.t(), weight_top()).t()).to(grad.dtype), None, None


def weight_top():
    return 127.0 if torch.cpu._is_vnni_supported() else 64.0


def rounded(x, top):
    step = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    return (x.double() / step).round() * step


def hooked(family, vectors, columns):
    """The same by hooks on a plain model: every linear rounded, scales before it, offsets times the weight after it."""
    model = tiny_model(family)
    for linear, kept in zip(linears(model), columns, strict=True):
        linear.register_forward_hook(
            lambda module, args, output, kept=kept: Emulated.apply(args[0], module.weight, kept)
        )
    scales = Hook(model, {key: rows for key, rows in vectors.items() if key[1] == "scale"})
    offsets = {}
    for (layer, component), (_, rows) in vectors.items():
        if component == "offset":
            v = offsets[layer] = rows.clone().requires_grad_()
            o_proj = model.model.layers[layer].self_attn.o_proj
            o_proj.register_forward_hook(lambda module, args, output, v=v: output + v.flatten() @ module.weight.t())
    return model, {**scales.parameters, **{(layer, "offset"): v for layer, v in offsets.items()}}


def difference(family, components, seed):
    """Largest difference of loss and gradients, between a patched model in 8 bits and hooks, of the largest value."""
    model = tiny_model(family)
    handle = lf.patch(model, lf.LofitConfig(**{component: "all" for component in components}))
    randomize(handle, 0.2, seed)
    with prepared(model, INT8):
        loss, got = gradients(model)
        columns = [m.lofit_products.columns.kept for m in linears(model)]
    reference, parameters = hooked(family, vectors_of(handle), columns)
    ids = tokens(2, 9)
    expected = reference(input_ids=ids, labels=ids, use_cache=False).loss
    grads = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    found = [abs(loss / expected.item() - 1)]
    for (component, layer), gradient in zip(handle.vectors(), got, strict=True):
        other = grads[layer, component].view_as(gradient)
        found.append(((gradient - other).abs().max() / other.abs().max()).item())
    return max(found)


@pytest.mark.parametrize(
    ("family", "components"),
    [("llama", ["scale"]), ("llama", ["offset"]), ("llama", ["scale", "offset"]), ("gemma3", ["scale", "offset"])],
)
def test_patched_model_equals_hooks_on_a_quantized_base(family, components):
    # where a number is a rounding error away from the middle of two integers, the two may take different ones
    errors = sorted(difference(family, components, seed) for seed in (1, 2, 3))
    assert errors[1] <= 1e-5 and errors[-1] <= 0.05


def test_everything_is_put_back_after_an_error(family):
    model = patched(family)
    before = belongings(model)
    with pytest.raises(KeyError), prepared(model, INT8):
        assert belongings(model) != before
        raise KeyError
    assert belongings(model) == before


def test_an_error_while_weights_are_taken_is_the_error_and_leaves_nothing(llama, monkeypatch):
    llama.requires_grad_(False)
    before, taken = belongings(llama), []

    def full(weight, kind, columns=None):
        if len(taken) == 5:
            raise MemoryError("no room for the scales")
        taken.append(FrozenWeight(weight, kind, columns))
        return taken[-1]

    monkeypatch.setattr("lofit_fast.patching.frozen_linear.FrozenWeight", full)
    with pytest.raises(MemoryError, match="no room"):
        prepared(llama, INT8).__enter__()
    assert belongings(llama) == before


def test_names_state_and_hooks_are_the_models_own(llama):
    llama.requires_grad_(False)
    names, state = [n for n, _ in llama.named_modules()], llama.state_dict()
    with prepared(llama, INT8):
        assert [n for n, _ in llama.named_modules()] == names
        assert {k: id(v) for k, v in llama.state_dict(keep_vars=True).items()}.keys() == state.keys()
        seen = []
        hook = decoder_layers(llama)[0].mlp.up_proj.register_forward_hook(lambda *of: seen.append(of[2]))
        llama(tokens())
        hook.remove()
        assert seen[0].shape == (*tokens().shape, 48)


def test_a_copy_made_inside_says_that_its_scope_is_over(llama):
    llama.requires_grad_(False)
    with prepared(llama, INT8):
        copied = copy.deepcopy(llama)
        assert copied(tokens()).logits.equal(llama(tokens()).logits)
    with torch.no_grad():
        assert copied(tokens()).logits.equal(llama(tokens()).logits)
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        copied(tokens())


def test_a_weight_that_changes_before_its_first_use_is_noticed(llama):
    llama.requires_grad_(False)
    with prepared(llama, INT8):
        # its columns in full are known already
        llama.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="a weight has changed after it was quantized"):
            llama(tokens())


@pytest.mark.parametrize("adapted", [False, True])
def test_another_weight_in_its_place_is_noticed(adapted, llama):
    llama.requires_grad_(False)
    if adapted:
        lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, INT8):
        expected = llama(tokens()).logits
        projection = llama.model.layers[0].self_attn.o_proj
        old = projection.weight
        projection.weight = torch.nn.Parameter(old * 2, requires_grad=False)
        with pytest.raises(RuntimeError, match="given another weight after its own was quantized"):
            llama(tokens())
        projection.weight = old
        assert llama(tokens()).logits.equal(expected)


def test_routers_choose_experts_in_full():
    model = tiny_family("afmoe").requires_grad_(False)
    routers = [module for name, module in model.named_modules() if name.endswith("router.gate")]
    with pytest.warns(UserWarning, match="with as many outputs as there are experts"), prepared(model, INT8):
        assert routers and all(products_of(router) is None for router in routers)
        assert sum(products_of(m) is not None for m in linears(model)) > len(routers)


def test_merging_inside_is_refused_and_works_afterwards(llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, INT8), pytest.raises(ValueError, match="computes in 8 bits for now, until the scope"):
        handle.merge()
    handle.merge()


def test_saving_and_exporting_inside_take_the_weights_themselves(llama, tmp_path):
    handle = lf.patch(llama, lf.LofitConfig(offset=[(1, 2)]))
    randomize(handle)
    handle.save(tmp_path / "outside")
    with prepared(llama, INT8):
        handle.save(tmp_path / "inside")
        llama.save_pretrained(tmp_path / "base")
        inside = llama.state_dict()
    files = [tmp_path / where / "adapter.safetensors" for where in ("outside", "inside")]
    assert len({next(f.parent.glob("*.safetensors")).read_bytes() for f in files}) == 1
    assert all(value.equal(llama.state_dict()[name]) for name, value in inside.items())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model: model.double(), "for models in 16 or 32 bits, got torch.float64"),
        (lambda model: model.requires_grad_(True), "take plain frozen linears .*got none .21 not frozen"),
        (lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}), "reentrant checkpoints"),
        (lambda model: [listened(m) for m in linears(model)], "got none .21 not plain"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_refused_as_it_was(llama, break_it, message):
    llama.requires_grad_(False)
    break_it(llama)
    before = belongings(llama)
    with pytest.raises(ValueError, match=message):
        prepared(llama, INT8).__enter__()
    assert belongings(llama) == before


def linears(model):
    return [m for layer in decoder_layers(model) for m in layer.modules() if type(m) is torch.nn.Linear]


def listened(linear):
    return linear.register_forward_hook(lambda *of: None)


def test_fp8_is_refused_on_a_cpu(llama):
    with pytest.raises(ValueError, match="fp8 products are for GPUs"):
        prepared(llama, Engine(frozen_products="fp8")).__enter__()


def test_what_is_left_in_full_is_counted(llama):
    llama.requires_grad_(False)
    listened(linears(llama)[0])
    linears(llama)[1].weight.requires_grad_(True)
    counted = pytest.warns(UserWarning, match="of 21 linears 1 not plain .*, 1 not frozen: computed in full")
    with counted, prepared(llama, INT8):
        assert sum(products_of(m) is not None for m in linears(llama)) == 19


def test_linears_under_lora_compute_in_full(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    counted = pytest.warns(UserWarning, match=rf"of {LAYERS * LINEARS + 2 * LAYERS} linears {3 * LAYERS} under LoRA")
    with counted, prepared(model, INT8):
        assert not any(products_of(m.base_layer) for m in model.modules() if hasattr(m, "base_layer"))
        gradients(model)
    handle.unpatch()


@pytest.mark.parametrize("prompts, expected", [(1.0, "full"), (0.0, "int8")])
def test_auto_is_full_where_prompts_are_kept(prompts, expected, llama, monkeypatch):
    monkeypatch.setattr(frozen_products, "is_fast_on_cpu", lambda: True)
    handle = lf.patch(llama.requires_grad_(False), lf.LofitConfig(offset="all", positions="answer"))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    engine = Engine(frozen_products="auto", prompt_cache_gb=prompts)
    assert settle(handle, engine, rows, 0, 2, 1)[0].frozen_products == expected


def test_auto_is_int8_for_float32_on_a_fast_cpu_alone(llama, monkeypatch):
    llama.requires_grad_(False)
    monkeypatch.setattr(frozen_products, "is_fast_on_cpu", lambda: True)
    assert settled_products(llama, "auto") == "int8"
    assert settled_products(llama, "full") == "full"
    assert settled_products(llama, "auto", few_rows=True) == "full"
    assert settled_products(llama, "int8", few_rows=True) == "int8"
    assert settled_products(tiny_model("llama", torch.bfloat16).requires_grad_(False), "auto") == "full"
    assert settled_products(tiny_model("llama"), "auto") == "full"
    monkeypatch.setattr(frozen_products, "is_fast_on_cpu", lambda: False)
    assert settled_products(llama, "auto") == "full"


def test_engine_refuses_other_words():
    with pytest.raises(ValueError, match="frozen_products to be one of 'full', 'int8', 'fp8', 'auto', got 'int4'"):
        Engine(frozen_products="int4")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing(checkpointing, llama):
    randomize(lf.patch(llama, lf.LofitConfig(scale="all", offset="all")), 0.1)
    with prepared(llama, INT8):
        expected = gradients(llama)
        llama.gradient_checkpointing_enable({"use_reentrant": False})
        llama.train()
        got = gradients(llama)
    assert got[0] == expected[0]
    assert all(a.equal(b) for a, b in zip(got[1], expected[1], strict=True))


def test_a_run_trains_in_8_bits_evaluates_in_full_and_keeps_its_engine(llama, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(
        "lofit_fast.patching.frozen_linear.quantized_linear",
        lambda *of: modes.append(torch.is_grad_enabled()) or quantized_linear(*of),
    )
    result = fit(llama, tmp_path, engine=Engine(frozen_products="int8"), eval_data=HELD_OUT, heads=[(1, 2)])
    assert modes and all(modes)
    assert json.loads((tmp_path / "state.json").read_text())["engine"]["tune"]["frozen_products"] == "int8"
    rows = [encode(tiny_tokenizer(), row, None) for row in HELD_OUT]
    batch = CompletionCollator(0, logits="all")(rows)
    with torch.no_grad():
        loss = llama(**batch, use_cache=False).loss.item()
    assert result.history[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    result.handle.unpatch()
    # finished or not, it is another run
    with pytest.raises(ValueError, match="begun with frozen_products=int8, got full"):
        fit(llama, tmp_path, eval_data=HELD_OUT, heads=[(1, 2)])
    with pytest.raises(ValueError, match="begun with frozen_products=int8, got full"):
        begin_again(tmp_path, llama)


def begin_again(folder, model):
    """Go on with the last stage as one of another engine."""
    write_sealed(folder / "state.json", {**read_sealed(folder / "state.json"), "stage": "tune"})
    return fit(model, folder, engine=Engine(frozen_products="full"), eval_data=HELD_OUT, heads=[(1, 2)])


def test_a_run_from_before_there_was_a_choice_goes_on_in_full(llama, tmp_path):
    fit(llama, tmp_path, eval_data=HELD_OUT, heads=[(1, 2)]).handle.unpatch()
    path = tmp_path / "state.json"
    state = read_sealed(path)
    del state["engine"]["tune"]["frozen_products"]
    write_sealed(path, {**state, "stage": "tune"})
    again = begin_again(tmp_path, llama)
    assert again.heads == [(1, 2)] and again.handle.model is llama


def test_step_1_in_8_bits_is_not_shared_with_runs_in_full(llama, tmp_path):
    recipe, scores = lf.Recipe(top=2, select="saliency", tune_epochs=0), []
    for number, products in enumerate(("int8", "full", "int8")):
        how = {"engine": Engine(frozen_products=products), "step1_dir": tmp_path / "shared"}
        result = fit(llama, tmp_path / str(number), recipe, **how)
        result.handle.unpatch()
        scores.append(result.scores)
    alone = fit(llama, tmp_path / "alone", recipe)
    alone.handle.unpatch()
    assert scores[1].equal(alone.scores) and scores[2].equal(scores[0]) and not scores[0].equal(scores[1])
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_the_policy_of_dpo_begins_at_its_reference(llama, tmp_path):
    pytest.importorskip("trl")
    pairs = [Preference(f"{a}+b=", (a + "b") * 6, (("b" + a) * 6,)) for a in "cdefgh"]
    losses = []
    for products in ("full", "int8"):
        # offsets of zero, one step
        recipe = lf.Recipe(init_std=0.0, tune_epochs=1, batch_size=6)
        how = {"heads": [(1, 1)], "engine": Engine(frozen_products=products), "progress": False}
        result = lf.fit_preferences(llama, tiny_tokenizer(), pairs, recipe, output_dir=tmp_path / products, **how)
        losses.append(result.history[-1]["loss"])
        result.handle.unpatch()
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["scale", "offset"])
def test_compiled_layers_compute_the_same(component, quick_compiler):
    model = patched(**{component: "all"})
    full = gradients(model)
    with prepared(model, INT8):
        expected = gradients(model)
    with prepared(model, Engine(frozen_products="int8", compile=True, narrow=False)):
        for length in (9, 5, 31):
            got = gradients(model, length)
        got = gradients(model)
        # the first layer's input needs no gradient, the others' does
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        assert not torch._dynamo.utils.counters["graph_break"]
        with torch.no_grad():
            assert model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.item() == pytest.approx(
                full[0], rel=1e-6
            )
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for one, other in zip(got[1], expected[1], strict=True):
        assert (one - other).abs().max() <= 2e-3 * other.abs().max()
    with prepared(model, Engine(compile=True, narrow=False)):
        assert gradients(model)[0] == pytest.approx(full[0], rel=1e-6)
