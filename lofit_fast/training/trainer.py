"""transformers.Trainer for an attachment: an L1 term, adapter-only checkpoints, epoch means, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lofit_fast.data.encode import Encoded
from lofit_fast.data.lengths import GroupedByLength
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.storage import read_adapter
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.cpu_extras import release_free_memory
from lofit_fast.training.engine.device_queue import Sender, devices_of, wait_for
from lofit_fast.training.frozen_base import admitted


class AttachmentTraining:
    """What a trainer of transformers lacks to train an attachment: an L1 term, checkpoints of it alone, epoch reports.

    Mixed into a Trainer. handle: the attachment; checkpoints need a LofitHandle. l1: weight of sum |a| over all of a
    handle's scales, or over the offsets of one without scales. on_epoch: called with a dict after every epoch: epoch,
    loss (mean over its steps, without the L1 term), l1 (the term's last value), seconds, step_losses, and eval_loss
    where there is an evaluation set.
    """

    handle: Attachment
    l1: float
    on_epoch: Callable[[dict], None]
    sender: Sender | None = None

    def l1_term(self) -> Tensor:
        """l1 * sum |a|, a scalar."""
        layers = getattr(self.handle, "layers", {}).values()
        scales = [layer.scale for layer in layers if layer.scale is not None]
        vectors = scales or [layer.offset for layer in layers if layer.offset is not None]
        if not self.l1 or not vectors:
            return torch.zeros((), device=self.args.device)
        # one norm over all layers of a device instead of one kernel per layer
        on: dict[torch.device, list[Tensor]] = {}
        for vector in vectors:
            on.setdefault(vector.device, []).append(vector.flatten())
        norms = [torch.cat(flat).abs().sum() for flat in on.values()]
        first, *others = norms
        return self.l1 * sum((norm.to(first.device) for norm in others), first)

    def extra_loss(self) -> Tensor:
        """What is added to the loss once per optimizer step: the L1 term, and the attachment's own penalty."""
        penalty = getattr(self.handle, "penalty", None)
        return self.l1_term() if penalty is None else self.l1_term() + penalty()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's batches of a step, on their way to the device, and how many labels they have in all."""
        if self.sender is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        # labels are counted where they are
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, torch.device("cpu"))
        return self.sender.send(batches), self.sender.count(items)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # the frozen base is in the cache already: a checkpoint is the adapter
        self.handle.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.handle.take(read_adapter(resume_from_checkpoint))


class LofitTrainer(AttachmentTraining, Trainer):
    """Trains a handle's vectors, or any attachment's parameters, on completions; the rest of it is Trainer's.

    handle, l1, on_epoch: see `AttachmentTraining`. group_by_length: draw batches of examples of like length, see
    `GroupedByLength`.
    Raises FloatingPointError at the first epoch (on a CPU: step) whose loss is not finite.
    """

    def __init__(
        self,
        handle: Attachment,
        *,
        l1: float = 0.0,
        on_epoch: Callable[[dict], None],
        group_by_length: bool = False,
        **options,
    ) -> None:
        with admitted(handle.model):
            super().__init__(model=handle.model, **options)
        self.handle, self.l1, self.on_epoch, self.group_by_length = handle, l1, on_epoch, group_by_length
        # the model's loss is a mean over the whole accumulated batch already
        self.loss_is_scaled_for_ga = True
        leave_in_place(self)
        report_epochs(self)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        """The model's loss, plus l1 * sum |a| and the penalty while training."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
        if not model.training:
            return result
        loss = result[0] if return_outputs else result
        self.losses.add(loss.detach(), 1 / self.current_gradient_accumulation_steps)
        if loss.device.type == "cpu":
            check_finite(loss.item(), self.state.epoch)
        total = loss + self.extra_loss().to(loss.device) / self.current_gradient_accumulation_steps
        return (total, result[1]) if return_outputs else total

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(dataset)
        # transformers' own grouping sorts parts of an epoch, and walks each from its longest batch to its shortest
        lengths = [len(row["input_ids"]) for row in dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedByLength(lengths, batch_size, self.args.seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Trainer switches modes and the config's cache; a scope after which both are as they were.

    Within it the decoder's own config, which is another one in a multimodal model, asks for no cache either.
    """
    configs = {id(config): config for config in (model.config, text_config(model))}.values()
    before = [(config, dict(vars(config))) for config in configs]
    try:
        for config in configs:
            if getattr(config, "use_cache", False):
                config.use_cache = False
        with eval_mode(model):
            yield
    finally:
        for config, had in before:
            if "use_cache" in had:
                config.use_cache = had["use_cache"]
            else:
                vars(config).pop("use_cache", None)


class Rows(torch.utils.data.Dataset):
    """A list as the Dataset that Trainer asks for."""

    def __init__(self, rows: list[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class _StepLosses:
    """The losses of an epoch's steps. They arrive in micro-batches and stay on the device until they are taken."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.loss, self.part = 0.0, 0.0

    def add(self, loss: Tensor, part: float) -> None:
        """Add a micro-batch's share of its step's loss. part: the share of a step it is."""
        self.loss, self.part = self.loss + loss.double(), self.part + part
        if self.part > 1 - 1e-6:
            self.steps.append(self.loss)
            self.loss, self.part = 0.0, 0.0

    def take(self) -> list[float]:
        """The losses so far; starts anew."""
        losses = torch.stack(self.steps).tolist()
        self.steps = []
        return losses


class _EpochReport(TrainerCallback):
    """Calls on_epoch once the epoch, and its evaluation if there is one, is over."""

    def __init__(self, trainer: AttachmentTraining) -> None:
        self.trainer = trainer
        self.devices = devices_of(trainer.handle.model)
        self.report: dict | None = None

    def on_epoch_begin(self, args, state, control, **_):
        if args.device.type == "cpu":
            release_free_memory()
        wait_for(self.devices)
        self.started = time.perf_counter()

    def on_epoch_end(self, args, state, control, **_):
        trainer = self.trainer
        wait_for(self.devices)
        seconds = time.perf_counter() - self.started
        steps = trainer.losses.take()
        loss = sum(steps) / len(steps)
        check_finite(loss, state.epoch)
        self.report = {
            # the last may have been cut short
            "epoch": math.ceil(state.epoch - 1e-6),
            "loss": loss,
            "l1": trainer.l1_term().item(),
            "seconds": seconds,
            "step_losses": [round(value, 5) for value in steps],
        }
        if trainer.eval_dataset is None:
            self._send()

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if self.report is not None:
            self.report["eval_loss"] = metrics["eval_loss"]
            self._send()

    def _send(self) -> None:
        self.trainer.on_epoch(self.report)
        self.report = None


class _QuietProgress(ProgressCallback):
    """Trainer's progress bar, with the loss beside it instead of a line of JSON per log."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def leave_in_place(trainer: AttachmentTraining) -> None:
    """Give a trainer its `sender`, and keep accelerate from moving the model and its batches to the first device.

    sender: None where the model is where transformers would put it.
    """
    device = getattr(trainer.args, "model_device", None)
    trainer.sender = None if device is None else Sender(device)
    if device is not None:
        trainer.accelerator.device_placement = False


def report_epochs(trainer: AttachmentTraining) -> None:
    """Give a trainer `losses` for every step's loss, a report to its `on_epoch`, and a quiet progress bar."""
    trainer.losses = _StepLosses()
    trainer.remove_callback(PrinterCallback)
    if any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_QuietProgress)
    trainer.add_callback(_EpochReport(trainer))


def check_finite(loss: float, epoch: float | None) -> None:
    """Raise FloatingPointError for a loss that is not a number to go on with."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} in epoch {epoch or 0:.2f}: training diverged; try a lower learning rate or float32"
        )
