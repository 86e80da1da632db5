"""Other people's trainers on a patched tiny model, and what is said of its vectors."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lofit_fast as lf
from lofit_fast.data.encode import encode
from lofit_fast.training import CompletionCollator
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = lf.LofitConfig(scale=[(1, 2)], offset=[(0, 1), (1, 3), (2, 0)], init_std=0.1)
TEXTS = [{"prompt": f"{n}: ", "completion": "abc"[n % 3] * 2} for n in range(8)]
PAIRS = [{"prompt": f"{n}: ", "chosen": "ab"[n % 2], "rejected": "xyz"[n % 3]} for n in range(8)]
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.05,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
    "bf16": False,
}


def data_set(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def stock(handle, folder, callbacks, **changes):
    rows = [encode(TOKENIZER, row, None) for row in TEXTS]
    args = TrainingArguments(
        str(folder), **COMMON, **changes, remove_unused_columns=False, prediction_loss_only=True, label_names=["labels"]
    )
    how = {"train_dataset": rows, "eval_dataset": rows[:3], "data_collator": CompletionCollator(0)}
    return Trainer(handle.model, args, **how, callbacks=callbacks)


def sft(handle, folder, callbacks, **changes):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(folder), **COMMON, **changes, max_length=None)
    rows = data_set(TEXTS)
    how = {"train_dataset": rows, "eval_dataset": rows.select(range(3)), "processing_class": TOKENIZER}
    return trl.SFTTrainer(handle.model, args=args, **how, callbacks=callbacks)


def dpo(handle, folder, callbacks, **changes):
    trl = pytest.importorskip("trl")
    from lofit_fast.training.preference_trainer import ReferencedDPOTrainer

    rows = lf.reference_logprobs(handle, data_set(PAIRS), TOKENIZER)
    args = trl.DPOConfig(str(folder), **COMMON, **changes, precompute_ref_log_probs=True)
    how = {"train_dataset": rows, "eval_dataset": rows.select(range(3)), "processing_class": TOKENIZER}
    return ReferencedDPOTrainer(handle.model, args=args, **how, callbacks=callbacks)


def own_dpo(handle, folder, callbacks, **changes):
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(str(folder), **COMMON, **changes)
    rows = data_set(PAIRS)
    reference = tiny_model("llama")
    how = {"train_dataset": rows, "eval_dataset": rows.select(range(3)), "processing_class": TOKENIZER}
    return trl.DPOTrainer(handle.model, reference, args=args, **how, callbacks=callbacks)


TRAINERS = {"Trainer": stock, "SFTTrainer": sft, "ReferencedDPOTrainer": dpo, "DPOTrainer": own_dpo}


def patched(**changes):
    return lf.patch(tiny_model("llama"), lf.LofitConfig(**{**vars(CONFIG), **changes}))


def vectors(handle):
    return torch.cat([parameter.detach().flatten() for parameter in handle.parameters()])


def told(caught):
    return [str(one.message) for one in caught if "LoFiT vectors" in str(one.message)]
