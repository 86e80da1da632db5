"""How one training goes: its schedule, and the arguments that transformers' trainers take of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from lofit_fast import ranks
from lofit_fast.launchers import launched, unlaunched
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine.device_queue import make_current, pins, runs_ahead
from lofit_fast.training.stage_checkpoints import KEPT


@dataclass(frozen=True)
class Schedule:
    """AdamW without decay (0.9, 0.999), its rate falling linearly to 0 without warm-up, gradients clipped.

    Args:
        lr: the rate of the first step.
        epochs: passes over the examples.
        batch_size: examples per optimizer step, taken in accumulation_steps micro-batches.
        accumulation_steps: a divisor of batch_size.
        l1: weight of sum |a| over the scales (over the offsets where there are no scales).
        max_grad_norm: what the gradient's norm is clipped to.
        seed: of the order of the examples.
        max_length: longest prompt and answer in tokens; None means the model's context.
        eval_batch_size: examples at a time where nothing is trained.

    Raises:
        ValueError: fewer than 0 epochs, or a batch that does not divide.
    """

    lr: float
    epochs: int
    batch_size: int = 8
    accumulation_steps: int = 1
    l1: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42
    max_length: int | None = None
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"expected epochs >= 0 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if self.accumulation_steps < 1 or self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulation_steps {self.accumulation_steps}"
            )


def training_arguments(
    model: nn.Module,
    folder: Path | str,
    schedule: Schedule,
    *,
    progress: bool,
    keep: bool = False,
    kind: type[TrainingArguments] = TrainingArguments,
    **more,
) -> TrainingArguments:
    """A trainer's arguments on the device the model is on, where it stays; nothing is reported anywhere.

    Off the CPU nothing in them makes the host wait for the device within an epoch: batches come in pinned memory, and
    no step's loss is looked at. One process of several trains as if it were alone, as far as transformers knows: what
    they put together is in `shared_batches`. All but the first know that files and progress are not theirs.

    Args:
        model: what is trained.
        folder: where the trainer may write.
        schedule: see `Schedule`.
        progress: whether a bar is shown.
        keep: whether a checkpoint is left after every epoch; the last `stage_checkpoints.KEPT` are kept.
        kind: TrainingArguments or a class derived from it.
        more: its other fields.
    """
    device = device_of(model)
    ahead = runs_ahead(device)
    saving = {"save_strategy": "epoch", "save_total_limit": KEPT} if keep else {"save_strategy": "no"}
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": schedule.batch_size // schedule.accumulation_steps,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        "per_device_eval_batch_size": schedule.eval_batch_size,
        "learning_rate": schedule.lr,
        "num_train_epochs": schedule.epochs,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": schedule.max_grad_norm,
        "seed": schedule.seed,
        "logging_strategy": "epoch",
        "remove_unused_columns": False,
        "disable_tqdm": not progress,
        "use_cpu": not ahead,
        "dataloader_pin_memory": pins(device),
        # would read each step's loss from the device; losses are checked once an epoch
        "logging_nan_inf_filter": not ahead,
        "report_to": "none",
    }
    with unlaunched(), _not_said():
        arguments = _in_place(kind)(**{**common, **saving, **more})
    state = arguments.distributed_state
    state.process_index = state.local_process_index = ranks.rank()
    # Trainer would spread each batch over every GPU it sees, and multiply the batch size by their number
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if ahead and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        arguments.model_device = device
        # transformers has just made the first device the current one
        make_current(device)
    return arguments


@contextmanager
def accelerate_as_it_was() -> Iterator[None]:
    """A scope after which accelerate knows of the processes what it knew before: trainers tell it anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = (PartialState, AcceleratorState, GradientState)
    if ranks.count() == 1 and launched() is None:
        yield
        return
    before = {kind: kind._shared_state for kind in kinds}
    for kind in kinds:
        # objects that are about keep theirs
        kind._shared_state = {}
    try:
        yield
    finally:
        for kind, state in before.items():
            kind._shared_state = state


@contextmanager
def _not_said() -> Iterator[None]:
    """A scope in which transformers does not wonder at a group of processes of which it is told nothing."""
    log = logging.getLogger(TrainingArguments.__module__)
    before = log.disabled
    log.disabled = before or dist.is_available() and dist.is_initialized()
    try:
        yield
    finally:
        log.disabled = before


@cache
def _in_place(kind: type[TrainingArguments]) -> type[TrainingArguments]:
    """The arguments of a kind, with a model that stays where it is once `model_device` says where that is."""

    class InPlace(kind):
        model_device: torch.device | None = None

        @property
        def device(self) -> torch.device:
            return super().device if self.model_device is None else self.model_device

        @property
        def place_model_on_device(self) -> bool | None:
            return super().place_model_on_device if self.model_device is None else False

    return InPlace
