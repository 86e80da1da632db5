"""A look at batches of new shapes: nothing changes where all is right, and a planted fault is found and gone around."""

from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching import layer as layer_module
from lofit_fast.training import Engine, prepared
from lofit_fast.training.verify_steps import TOLERANCE, StepCheck, plain_layers
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens
from tests.training.tiny_runs import EXAMPLES, QUICK, assert_equal_vectors, assert_same_state, fit, state_of, vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [lf.LofitConfig(scale="all"), lf.LofitConfig(offset=[(0, 1), (2, 3)])])
def test_plain_layers_compute_what_the_fused_ones_do(config, dtype):
    handle = lf.patch(tiny_model("llama", dtype), config)
    randomize(handle, 0.3)
    ids = tokens()
    with torch.no_grad():
        fused = handle.model(ids).logits
        with plain_layers(handle):
            plain = handle.model(ids).logits
        assert torch.equal(handle.model(ids).logits, fused)
    assert (fused - plain).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


def test_every_shape_is_looked_at_once_and_nothing_is_left_behind():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale="all", offset="all"))
    check = StepCheck(handle, say=pytest.fail)
    vector = next(handle.parameters())
    vector.grad = torch.ones_like(vector)
    state = torch.get_rng_state()
    for length in (5, 7, 5, 7, 5):
        ids = tokens(2, length)
        check.look({"input_ids": ids}, lambda ids=ids: handle.model(ids, labels=ids, use_cache=False).loss)
    assert (check.batches, check.fell_back) == (2, False)
    assert vector.grad.eq(1).all() and sum(v.grad is not None for v in handle.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(layer) for layer in handle.layers.values())


def wrong(op):
    def off(*args, **options):
        return 1.2 * op(*args, **options)

    return off


def test_a_wrong_kernel_is_found_and_the_run_is_that_of_plain_layers(tmp_path, monkeypatch, capsys):
    model, how = tiny_model("llama"), {"recipe": QUICK, "heads": [(1, 2), (0, 0)]}
    before = state_of(model)
    with monkeypatch.context() as patched:
        for name in ("head_affine_linear", "folded_linear"):
            patched.setattr(layer_module, name, wrong(getattr(layer_module, name)))
        found = fit(model, tmp_path / "found", **how, engine=Engine(verify=True, compile=False))
        tuned = vectors(found.handle)
        found.handle.unpatch()
        unnoticed = fit(model, tmp_path / "unnoticed", **how, engine=Engine(compile=False))
        assert not vectors(unnoticed.handle)[0].equal(tuned[0])
        unnoticed.handle.unpatch()
    said = [line for line in capsys.readouterr().err.splitlines() if "fused layers differ" in line]
    assert len(said) == 1 and "input_ids" in said[0]
    assert_same_state(model, before, but=("modes", "config"))
    # no difference is small enough: the layers compute plainly from the first batch on
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)
    right = fit(model, tmp_path / "right", **how, engine=Engine(verify=True, compile=False))
    assert_equal_vectors(vectors(right.handle), tuned)


@pytest.mark.parametrize("recipe", [QUICK, replace(QUICK, positions="answer")])
def test_a_look_changes_no_bit_of_a_run(tmp_path, recipe, capsys):
    results = []
    for verify in (False, True):
        engine = Engine(verify=verify)
        results.append(
            vectors(fit(tiny_model("llama"), tmp_path / str(verify), recipe, EXAMPLES, engine=engine).handle)
        )
    assert_equal_vectors(*results)
    assert "differ" not in capsys.readouterr().err


def test_who_cannot_be_looked_at_says_so(tmp_path):
    with pytest.raises(TypeError, match="verify"):
        Engine(verify="auto")


def test_products_in_8_bits_are_no_fault_of_the_layers(monkeypatch):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    randomize(handle, 0.1)
    ids = tokens(4, 12)

    def looked(say):
        check = StepCheck(handle, say)
        check.look({"input_ids": ids}, lambda: handle.model(ids, labels=ids, use_cache=False).loss)
        check.close()
        return check.fell_back

    with prepared(handle.model, Engine(frozen_products="int8")):
        assert not looked(pytest.fail)
        right = layer_module.quantized_linear
        monkeypatch.setattr(layer_module, "quantized_linear", lambda *given: -right(*given))
        assert looked(str)
