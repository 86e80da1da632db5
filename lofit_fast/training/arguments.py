"""The arguments of a Trainer, alike for every method: AdamW's rate falling linearly to 0, no decay, no reporting."""

from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments


def training_arguments(
    model: nn.Module,
    folder: Path | str,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    max_grad_norm: float,
    progress: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more,
) -> TrainingArguments:
    """A step per `batch_size` examples on the device the model is on; nothing is saved unless `more` says so.

    kind: TrainingArguments or a class derived from it. more: its other fields.
    """
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "num_train_epochs": epochs,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "remove_unused_columns": False,
        "disable_tqdm": not progress,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    }
    arguments = kind(**{**common, **more})
    # Trainer would spread each batch over every GPU it sees, and multiply the batch size by their number
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
