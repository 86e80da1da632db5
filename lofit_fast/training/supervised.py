"""Training any attachment on prompts and completions: one loss, one schedule and one engine for all methods."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from lofit_fast.architectures import text_config
from lofit_fast.baselines.attachment import Attachment
from lofit_fast.encoding import Encoded, encode, pad_token_id
from lofit_fast.tasks.task import Example
from lofit_fast.training.collate import CompletionCollator
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.probe import settle
from lofit_fast.training.trainer import LofitTrainer, Rows, undisturbed

# rivals are not prepared for compiling, and one row hides where its prompts end
ENGINE = Engine(compile=False, packing=False)


def train_supervised(
    attachment: Attachment,
    tokenizer,
    examples: Sequence[Example | Mapping[str, str]],
    *,
    lr: float,
    epochs: int,
    batch_size: int = 8,
    l1: float = 0.0,
    seed: int = 42,
    output_dir: Path | str,
    max_grad_norm: float = 1.0,
    engine: Engine | None = None,
    progress: bool = True,
) -> dict:
    """Train what an attachment has to train: AdamW without decay, lr falling linearly to 0, gradients clipped.

    l1: weight of sum |a|, for a LofitHandle with scales. engine: None probes the attention kernel and compiles nothing.
    output_dir: where Trainer may write; nothing is kept there.
    Returns "seconds" of the training itself and "loss", its mean per epoch, penalties left out.
    Raises ValueError for an attachment without parameters, no examples, or one that is too long; FloatingPointError
    when training diverges, with the attachment still in the model.
    """
    model = attachment.model
    if not any(True for _ in attachment.parameters()):
        raise ValueError(f"{type(attachment).__name__} has nothing to train")
    if not len(examples):
        raise ValueError("the training data is empty: expected at least one example")
    limit = getattr(text_config(model), "max_position_embeddings", None)
    rows = [encode(tokenizer, example, limit) for example in examples]
    collator = CompletionCollator(pad_token_id(tokenizer))
    engine, why = _settled(attachment, engine or ENGINE, rows, collator, batch_size, epochs)
    if progress:
        print(why, file=sys.stderr)
    losses = []
    started = time.perf_counter()
    with undisturbed(model), prepared(model, engine):
        LofitTrainer(
            attachment,
            l1=l1,
            group_by_length=engine.group_by_length,
            on_epoch=lambda report: losses.append(report["loss"]),
            args=_arguments(model, output_dir, lr, epochs, batch_size, seed, max_grad_norm, progress),
            train_dataset=Rows(rows),
            data_collator=CompletionCollator(collator.pad_token_id, packed=engine.packing),
        ).train()
    return {"seconds": time.perf_counter() - started, "loss": losses}


def _settled(attachment, engine: Engine, rows: list[Encoded], collator, batch_size: int, epochs: int):
    """(engine, why) with every "auto" decided on a batch of middling length."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    middle = ordered[max(0, (len(ordered) - batch_size) // 2) :][:batch_size]
    device = next(attachment.model.parameters()).device

    def batch() -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in collator(middle).items()}

    return settle(attachment, engine, batch, epochs * math.ceil(len(rows) / batch_size))


def _arguments(
    model: nn.Module, folder, lr: float, epochs: int, batch_size: int, seed: int, max_grad_norm: float, progress: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        num_train_epochs=epochs,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
        seed=seed,
        save_strategy="no",
        logging_strategy="epoch",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=not progress,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    # Trainer would spread each batch over every GPU it sees, and multiply the batch size by their number
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
