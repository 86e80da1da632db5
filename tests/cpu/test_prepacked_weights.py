"""The scope of prepacked weights: what it takes, what it leaves, that results stay, and when "auto" means it."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.cpu import prepacked_weights
from lofit_fast.cpu.prepacked_weights import memory_bytes, pays_to_prepack, prepackable, prepacked, prepacking_refusal
from lofit_fast.models import shared_pages
from lofit_fast.patching.mergeable import why_not_plain
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_fast.patching.prepacked import is_prepacked, prepack
from lofit_fast.sealed import read_sealed, write_sealed
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.auto import settle
from lofit_fast.training.sweep import processes
from lofit_kernels import held_weight
from lofit_kernels.prepacked_linear import refusal
from tests.oracle import randomize
from tests.tiny_families import tiny_family
from tests.tiny_models import LAYERS, tiny_model, tokens
from tests.training.engine.engine_effects import belongings, gradients
from tests.training.tiny_runs import QUICK, fit

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no prepacked weights here: {refusal()}")
PREPACKED = Engine(prepack=True)
# few rows a step, for which "auto" prepacks
ANSWERS = replace(QUICK, positions="answer")
# q, k, v, gate, up, down; o is the vectors'
UNTUNED = 6


def patched(family="llama", **config):
    model = tiny_family(family)
    randomize(lf.patch(model, lf.LofitConfig(**(config or {"scale": "all", "offset": "all"}))), 0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen2", "mixtral", "gpt2"])
def test_loss_and_gradients_are_those_of_plain_weights(family):
    model = patched(family)
    expected, expected_gradients = gradients(model)
    with prepared(model, PREPACKED):
        assert any(map(is_prepacked, model.modules()))
        loss, got = gradients(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    for one, other in zip(got, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert gradients(model)[0] == expected


def test_the_head_is_taken_and_projections_with_vectors_are_not(llama):
    lf.patch(llama, lf.LofitConfig(offset=[(1, 0)]))
    with prepared(llama, PREPACKED):
        taken = [name for name, module in llama.named_modules() if is_prepacked(module)]
    assert len(taken) == LAYERS * (UNTUNED + 1) - 1 + 1 and "lm_head" in taken
    assert not any(name.startswith("model.layers.1.self_attn.o_proj") for name in taken)


def test_everything_is_put_back_after_an_error(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    before = belongings(llama)
    with pytest.raises(KeyError), prepared(llama, PREPACKED):
        assert belongings(llama) != before
        raise KeyError
    assert belongings(llama) == before


def test_hooks_on_a_linear_go_on(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    plain = gradients(llama)[0]
    hook = llama.lm_head.register_forward_pre_hook(lambda module, args: (50 * args[0],))
    expected = gradients(llama)[0]
    with prepared(llama, PREPACKED):
        assert is_prepacked(llama.lm_head)
        assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6) and expected != pytest.approx(plain, rel=1e-3)
    hook.remove()


def replaced(model):
    model.lm_head.forward = lambda x: 3 * nn.functional.linear(x, model.lm_head.weight)


def subclassed(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Doubled(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def normed(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    model.lm_head.requires_grad_(False)


def trained(model):
    model.lm_head.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [replaced, subclassed, normed, trained])
def test_what_computes_otherwise_or_is_trained_is_left_alone(llama, change):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    change(llama)
    expected = gradients(llama)[0]
    with prepared(llama, PREPACKED):
        assert not is_prepacked(llama.lm_head)
        assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6)
    handle.unpatch()


def test_a_weight_that_is_trained_by_now_has_its_gradient(llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    weight, ids = llama.model.layers[1].mlp.up_proj.weight, tokens(2, 9)
    wanted = [weight, *handle.parameters()]

    def grads():
        return torch.autograd.grad(llama(input_ids=ids, labels=ids, use_cache=False).loss, wanted)

    weight.requires_grad_(True)
    expected = grads()
    weight.requires_grad_(False)
    with prepared(llama, PREPACKED):
        weight.requires_grad_(True)
        for one, other in zip(grads(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_another_weight_counts_from_then_on(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, PREPACKED):
        gradients(llama)
        llama.lm_head.weight = nn.Parameter(torch.zeros_like(llama.lm_head.weight), requires_grad=False)
        assert llama(tokens()).logits.abs().max() == 0


def test_a_weight_that_changes_counts_from_then_on(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, PREPACKED):
        gradients(llama)
        # as PEFT's merge writes, which torch does not count
        llama.lm_head.weight.data *= 0
        assert llama(tokens()).logits.abs().max() == 0
        assert gradients(llama)[0] == pytest.approx(math.log(llama.lm_head.out_features))


def test_a_sweeps_workers_say_how_many_they_are(monkeypatch):
    monkeypatch.setattr(shared_pages, "_beside", 1)
    monkeypatch.setattr(processes, "end_with", lambda watched: None)
    processes._begin(torch.get_num_threads(), 3, None)
    assert shared_pages.memory_shares() == 3


@pytest.mark.parametrize("engine", [PREPACKED, Engine(frozen_products="int8")])
def test_rows_may_be_given_by_name(llama, engine):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    linear, x = llama.model.layers[0].mlp.up_proj, torch.randn(3, llama.config.hidden_size)
    with prepared(llama, engine):
        assert "forward" in vars(linear)
        torch.testing.assert_close(linear(input=x), linear(x))


def test_forward_derivatives_go_through(llama):
    head = llama.lm_head.requires_grad_(False)
    x = torch.randn(3, head.in_features)
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, PREPACKED):
        assert is_prepacked(head)
        y, tangent = torch.func.jvp(head, (x,), (2 * x,))
    torch.testing.assert_close(tangent, 2 * y)


def test_autocast_is_as_it_is_with_plain_weights(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(llama)[0]
        with prepared(llama, PREPACKED):
            assert gradients(llama)[0] == expected


# another compiler than the one that makes code: what is seen here is whether it takes the layers whole
@pytest.mark.slow
def test_compiled_layers_take_them(monkeypatch):
    monkeypatch.setattr("lofit_fast.training.engine.compiled_layers.BACKEND", "aot_eager")
    llama = tiny_model("llama", num_hidden_layers=1)
    lf.patch(llama, lf.LofitConfig(offset="all"))
    expected, expected_gradients = gradients(llama)
    with prepared(llama, Engine(attention="sdpa", compile=True, prepack=True)):
        loss, got = gradients(llama)
    assert loss == pytest.approx(expected, rel=1e-6)
    for one, other in zip(got, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_beside_products_in_8_bits_the_head_is_prepacked(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, Engine(frozen_products="int8")):
        expected = gradients(llama)[0]
    with prepared(llama, Engine(frozen_products="int8", prepack=True)):
        assert [name for name, module in llama.named_modules() if is_prepacked(module)] == ["lm_head"]
        assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6)


def test_copies_and_pickles_made_inside_are_plain_for_good(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    expected, file = gradients(llama)[0], io.BytesIO()
    with prepared(llama, PREPACKED):
        copied = copy.deepcopy(llama)
        torch.save(llama, file)
        assert not any(map(is_prepacked, copied.modules()))
        with torch.no_grad():
            copied.lm_head.weight.mul_(0)
        assert copied(tokens()).logits.abs().max() == 0
        assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6)
    assert copied(tokens()).logits.abs().max() == 0
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (copied, loaded):
        before = gradients(model)[0]
        # what is left of the scope does not stand in the way
        linear = model.model.layers[0].mlp.up_proj
        assert is_plain_linear(linear) and why_not_plain(linear) is None
        with prepared(model, PREPACKED):
            assert is_prepacked(model.lm_head)
            assert gradients(model)[0] == pytest.approx(before, rel=1e-6)
    assert gradients(loaded)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_scopes_inside_each_other_end_in_any_order(llama, first):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    before, expected = belongings(llama), gradients(llama)[0]
    scopes = [prepared(llama, PREPACKED) for _ in range(2)]
    for scope in scopes:
        scope.__enter__()
    for scope in (scopes[first], scopes[1 - first]):
        assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6)
        scope.__exit__(None, None, None)
    assert belongings(llama) == before


def test_what_has_wrapped_a_forward_keeps_one_that_computes(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    expected = gradients(llama)[0]
    with prepared(llama, PREPACKED):
        inner = llama.lm_head.forward
        llama.lm_head.forward = lambda x: inner(x)
    assert gradients(llama)[0] == pytest.approx(expected, rel=1e-6)


def test_one_thread_may_leave_while_another_computes(llama, monkeypatch):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    head, x = llama.lm_head, torch.randn(2, llama.lm_head.in_features)
    # it has looked just before
    monkeypatch.setattr("lofit_fast.patching.prepacked.is_taken", lambda *_: True)
    with prepared(llama, PREPACKED):
        head.lofit_prepacked.close()
        torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight))


def test_an_interrupt_on_the_way_in_leaves_nothing(llama, monkeypatch):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    before, held = belongings(llama), set(held_weight._held)

    def interrupted(linear, weight):
        prepack(linear, weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepacked_weights, "prepack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(llama, PREPACKED).__enter__()
    assert belongings(llama) == before and set(held_weight._held) == held


def test_where_8_bits_leave_nothing_it_is_no_error(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    llama.lm_head.requires_grad_(True)
    with prepared(llama, Engine(frozen_products="int8", prepack=True)):
        assert not any(map(is_prepacked, llama.modules()))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weights_without_numbers_are_left_alone():
    empty = nn.utils.skip_init(nn.Linear, 0, 3)
    model = nn.Sequential(empty, nn.Linear(3, 4)).requires_grad_(False)
    assert prepackable(model) == [model[1]]


def test_linears_that_share_a_weight_share_its_layout(llama):
    mlps = [layer.mlp for layer in llama.model.layers]
    mlps[1].up_proj.weight = mlps[0].up_proj.weight
    lf.patch(llama, lf.LofitConfig(offset="all"))
    with prepared(llama, PREPACKED):
        assert mlps[0].up_proj.lofit_prepacked is mlps[1].up_proj.lofit_prepacked
        assert mlps[0].up_proj.lofit_prepacked is not mlps[2].up_proj.lofit_prepacked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused_before_anything_is_changed(dtype):
    model = tiny_model("llama", dtype)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    before = belongings(model)
    with pytest.raises(ValueError, match=f"float32 models on a CPU, got {dtype} on cpu"):
        prepared(model, PREPACKED).__enter__()
    assert belongings(model) == before
    with pytest.raises(ValueError, match="prepack=True was asked for, but .* use prepack=False"):
        settle(handle, PREPACKED, [{"input_ids": [3, 4], "labels": [3, 4]}], 0, 8, 1)
    assert not pays_to_prepack(model)


def test_auto_means_large_weights_that_fit_the_memory(llama, monkeypatch):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    assert prepackable(llama) and not pays_to_prepack(llama)
    monkeypatch.setattr(prepacked_weights, "LEAST", llama.lm_head.weight.numel() + 1)
    # what is asked for is done all the same
    assert not pays_to_prepack(llama) and prepacking_refusal(llama) is None
    assert len(prepackable(llama)) == LAYERS * UNTUNED + 1
    monkeypatch.setattr(prepacked_weights, "LEAST", llama.lm_head.weight.numel())
    assert prepackable(llama) == [llama.lm_head] and pays_to_prepack(llama)
    taken = 8 * sum(linear.weight.numel() for linear in prepackable(llama))
    for memory, pays in ((5 * taken, True), (5 * taken - 8, False)):
        monkeypatch.setattr(prepacked_weights, "memory_bytes", lambda memory=memory: memory)
        assert pays_to_prepack(llama) is pays
    # as of a sweep with two jobs
    monkeypatch.setattr(shared_pages, "_beside", 2)
    monkeypatch.setattr(prepacked_weights, "memory_bytes", lambda: 5 * taken)
    assert not pays_to_prepack(llama)


def test_a_control_group_bounds_the_memory(tmp_path, monkeypatch):
    whole = memory_bytes()
    for text, expected in (("max\n", whole), ("123456\n", 123456), ("", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(prepacked_weights, "_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
        assert memory_bytes() == (min(whole, expected))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_goes_on_as_it_began(llama, tmp_path, monkeypatch, earlier):
    monkeypatch.setattr(prepacked_weights, "LEAST", 1)
    fit(llama, tmp_path, ANSWERS).handle.unpatch()
    state = read_sealed(tmp_path / "state.json")
    assert [state["engine"][stage]["prepack"] for stage in ("select", "tune")] == [True, True]
    if earlier:
        # an earlier release says nothing of it
        for engine in state["engine"].values():
            del engine["prepack"]
    write_sealed(tmp_path / "state.json", {**state, "stage": "tune"})
    entered = []
    monkeypatch.setattr("lofit_fast.training.engine.prepacked", lambda model: entered.append(model) or prepacked(model))
    # the rule has another answer by now
    monkeypatch.setattr(prepacked_weights, "memory_bytes", lambda: 0)
    fit(llama, tmp_path, ANSWERS).handle.unpatch()
    assert entered == ([] if earlier else [llama])


def test_a_run_that_was_begun_with_them_goes_on_without(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(prepacked_weights, "LEAST", 1)
    fit(llama, tmp_path, ANSWERS).handle.unpatch()
    state = read_sealed(tmp_path / "state.json")
    assert state["engine"]["tune"]["prepack"] is True
    monkeypatch.setattr("lofit_fast.training.engine.prepacked", None)
    write_sealed(tmp_path / "state.json", {**state, "stage": "tune"})
    fit(llama, tmp_path, ANSWERS, engine=Engine(prepack=False)).handle.unpatch()
    # as on another machine
    monkeypatch.setattr("lofit_fast.training.kept_engine.prepacking_refusal", lambda model: "there are none")
    write_sealed(tmp_path / "state.json", {**state, "stage": "tune"})
    fit(llama, tmp_path, ANSWERS).handle.unpatch()


def test_whole_sequences_have_none_unless_asked_for(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(prepacked_weights, "LEAST", 1)
    for number, (asked, taken) in enumerate((("auto", False), (True, True))):
        fit(llama, tmp_path / str(number), heads=[(1, 2)], engine=Engine(prepack=asked)).handle.unpatch()
        assert read_sealed(tmp_path / str(number) / "state.json")["engine"]["tune"]["prepack"] is taken
