"""LofitTrainer on a tiny model with plain settings."""

from transformers import TrainingArguments

import lofit_fast as lf
from lofit_fast.data.encode import IGNORED
from lofit_fast.training import CompletionCollator, LofitTrainer
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens

COLLATE = CompletionCollator(0)


def rows(count):
    """Rows of unequal length with unequal numbers of labels, so that means over rows and over tokens differ."""
    result = []
    for seed in range(count):
        length, labelled = 6 + seed % 5, 1 + seed % 4
        ids = tokens(1, length, seed)[0].tolist()
        result.append({"input_ids": ids, "labels": [IGNORED] * (length - labelled) + ids[-labelled:]})
    return result


def trainer_on(
    handle, folder, count=8, l1=0.0, history=None, evaluation=None, callbacks=None, optimizers=(None, None), **args
):
    """A LofitTrainer with plain settings; history collects what on_epoch is called with."""
    common = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return LofitTrainer(
        handle,
        l1=l1,
        on_epoch=([] if history is None else history).append,
        args=TrainingArguments(output_dir=str(folder), **{**common, **args}),
        train_dataset=rows(count),
        eval_dataset=evaluation,
        data_collator=COLLATE,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def scaled(std=0.1):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale="all"))
    randomize(handle, std)
    return handle
