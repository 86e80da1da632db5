"""Training on quantized bases: both steps, the trainers' doors, and bases that cannot be trained through."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lofit_fast as lf
from lofit_fast.tasks.task import Preference
from lofit_fast.training.frozen_base import admitted, check_passes_gradients
from tests.packed_linears import KINDS, STAND_INS, cuts_gradients, packed_model
from tests.patched_models import logits
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import QUICK, assert_same_state, fit, state_of

# a fit takes a second or two
QUICKLY = ("gptq-like", "bitsandbytes-4", "torchao-int8")


@pytest.mark.parametrize("kind", [k if k in QUICKLY else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_fit_on_a_quantized_base(kind, tmp_path):
    """Both steps, and the saved adapter on the same base loaded anew."""
    model = packed_model(KINDS[kind])
    result = fit(model, tmp_path)
    assert [row["stage"] for row in result.history] == ["select", "tune"]
    assert model.is_quantized
    assert all(
        parameter.grad is None or parameter in set(result.handle.parameters()) for parameter in model.parameters()
    )
    with torch.no_grad():
        expected = logits(model)
        again = packed_model(KINDS[kind])
        lf.load(again, tmp_path / "adapter")
        assert logits(again).equal(expected)
    # the run knows its base
    result.handle.unpatch()
    assert fit(model, tmp_path).heads == result.heads
    with pytest.raises(ValueError, match="another model"):
        fit(packed_model(KINDS[kind], seed=1), tmp_path)


def test_fit_refuses_a_base_that_cuts_gradients_off(tmp_path):
    model = packed_model(cuts_gradients)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"cannot train through model\.layers\.0\.\S+, a ForInference that gives no"):
        fit(model, tmp_path / "run")
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


def test_kernels_for_inference_are_found_by_their_weights():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_model("llama").requires_grad_(False)
    check_passes_gradients(model)
    quantization.quantize_(model.model.layers, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="a Linear of Int8Tensor that gives no gradient"):
        check_passes_gradients(model)


def test_preferences_on_a_quantized_base_leave_the_vectors_wide(tmp_path):
    """TRL rounds to bfloat16 what a model trains that says it is loaded in 4 bits."""
    pytest.importorskip("trl", reason="TRL is not installed")
    # TRL asks it about a model that says so
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = packed_model(STAND_INS["gptq-like"])
    model.is_loaded_in_4bit = True
    rows = [Preference(f"{a}=", "x", ("y",)) for a in "abcd"]
    how = {"output_dir": tmp_path, "heads": [(1, 0)], "progress": False}
    result = lf.fit_preferences(model, tiny_tokenizer(), rows, QUICK, **how)
    assert {parameter.dtype for parameter in result.handle.parameters()} == {torch.float32}
    assert model.is_loaded_in_4bit


def test_stock_trainer_is_made_inside_the_scope(tmp_path):
    model = packed_model(STAND_INS["gptq-like"])
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="something to train"), admitted(model.requires_grad_(False)):
        pass
    handle = lf.patch(model, lf.LofitConfig(offset=[(1, 0)]))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)
    with admitted(model):
        Trainer(model, arguments)
    assert model.is_quantized
    with pytest.raises(KeyError), admitted(model):
        raise KeyError
    assert vars(model)["is_quantized"] is True
    handle.unpatch()
    with admitted(tiny_model("llama")) as nothing:
        assert nothing is None
