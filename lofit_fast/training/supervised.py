"""Training any attachment on prompts and completions: one loss, one schedule and one engine for all methods."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.data.pack import collator_of
from lofit_fast.patching.architectures import text_config
from lofit_fast.tasks.task import Example
from lofit_fast.training.arguments import training_arguments
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.auto import settle_on
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
    pad = pad_token_id(tokenizer)
    engine, why = settle_on(attachment, engine or ENGINE, rows, pad, batch_size, epochs)
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
            args=training_arguments(
                model,
                output_dir,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_grad_norm=max_grad_norm,
                progress=progress,
                prediction_loss_only=True,
            ),
            train_dataset=Rows(rows),
            data_collator=collator_of(engine, pad),
        ).train()
    return {"seconds": time.perf_counter() - started, "loss": losses}
