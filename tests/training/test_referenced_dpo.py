"""TRL's DPO on references of ours: what would make the model compute something else than they are of is refused."""

import pytest
import torch

import lofit_fast as lf
from tests.tiny_models import tiny_model
from tests.training.stock_trainers import PAIRS, TOKENIZER, data_set

trl = pytest.importorskip("trl", reason="trl is not installed")


def trainer(folder, dtype=torch.float32, **settings):
    from lofit_fast.training.preference_trainer import ReferencedDPOTrainer

    handle = lf.patch(tiny_model("llama", dtype), lf.LofitConfig(offset="all"))
    rows = lf.reference_logprobs(handle, data_set(PAIRS), TOKENIZER)
    how = {"precompute_ref_log_probs": True, "use_cpu": True, "report_to": "none", "logging_steps": 1, "max_steps": 1}
    args = trl.DPOConfig(str(folder), **how, **settings)
    return ReferencedDPOTrainer(handle.model, args=args, train_dataset=rows, processing_class=TOKENIZER)


def test_pairs_that_trl_would_cut_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got max_length=4 and a pair of \d+ tokens.*expected max_length=None"):
        trainer(tmp_path, bf16=False, max_length=4)


def test_autocast_to_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got bf16=True .* and a model in torch.float32.*Expected bf16=False"):
        trainer(tmp_path, bf16=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_begins_as_its_reference(tmp_path, dtype):
    """Vectors of zeros: no answer is preferred yet, so that the loss is log 2."""
    made = trainer(tmp_path, dtype, bf16=dtype is torch.bfloat16, max_length=None)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-3 if dtype is torch.float32 else 0.05)
