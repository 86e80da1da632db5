"""transformers' Trainer on completions, for an attachment, with a report of every epoch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lofit_fast import ranks
from lofit_fast.data.collate import labels_counted, n_labels
from lofit_fast.data.encode import Encoded
from lofit_fast.data.lengths import GroupedByLength
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.placement import device_of, is_offloaded
from lofit_fast.training.agreed_control import AgreedControl
from lofit_fast.training.alike_steps import AlikeSteps
from lofit_fast.training.attachment_training import AttachmentTraining, StepLosses
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.cpu_extras import release_free_memory
from lofit_fast.training.engine.device_queue import Sender, devices_of, runs_ahead, wait_for
from lofit_fast.training.finite_steps import FiniteSteps, Shown
from lofit_fast.training.frozen_base import admitted
from lofit_fast.training.shared_batches import SHARE, ShareCollator, n_labels_of, shared_steps, sharers

# whether transformers is older than `loss_is_scaled_for_ga`: it divides by the number of batches in any case then
_DIVIDES_UNASKED = not hasattr(Trainer, "loss_is_scaled_for_ga")


class LofitTrainer(AttachmentTraining, Trainer):
    """Trains a handle's vectors, or any attachment's parameters, on completions; the rest of it is Trainer's.

    handle, l1, on_epoch: see `AttachmentTraining`. group_by_length: draw batches of examples of like length, see
    `GroupedByLength`. shown: a short text of a training example, by its number from 0. divides: whether the model's
    loss is divided by the number of labels that it is called with, see `label_counts`; where it is not, each batch's
    mean counts by the part that its labels are of the step's. Those that take no such number never are.
    Raises FloatingPointError at the first epoch (on a CPU: step) whose loss or gradient is not finite, see
    `finite_steps`; nothing of that epoch is saved.
    """

    def __init__(
        self,
        handle: Attachment,
        *,
        l1: float = 0.0,
        on_epoch: Callable[[dict], None],
        group_by_length: bool = False,
        shown: Shown | None = None,
        divides: bool = True,
        **options,
    ) -> None:
        numbers = _numbers(options.get("train_dataset"))
        if (collate := options.get("data_collator")) is not None:
            collate = ShareCollator(collate, n_labels_of) if sharers(handle.model) > 1 else collate
            options["data_collator"] = self.noted(collate, lambda row: numbers.get(id(row)))
        with admitted(handle.model):
            super().__init__(model=handle.model, **options)
        self.handle, self.l1, self.on_epoch, self.group_by_length = handle, l1, on_epoch, group_by_length
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and divides
        # of each batch of the step that goes on, where its loss is a mean of its own
        self._parts: deque[float] = deque()
        # the loss of each batch that is evaluated, and how many labels it has
        self._evaluated: list[tuple[torch.Tensor, torch.Tensor]] = []
        # the loss is a mean over the whole accumulated batch already
        self.loss_is_scaled_for_ga = True
        leave_in_place(self)
        report_epochs(self, shown)

    def begin_step(self, batches: Sequence[Mapping]) -> None:
        """Count the labels of each batch, where the model does not divide by those of all."""
        divides = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        counted = () if divides or len(batches) < 2 else batches
        counts = [batch[SHARE].labels if SHARE in batch else n_labels(batch) for batch in counted]
        self._parts = deque(count / max(1, sum(counts)) for count in counts)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's, after a look at a batch of a new shape where that is asked for."""
        if self.verify is not None:
            inputs, compute = self._prepare_inputs(inputs), super().compute_loss
            model.train()
            self.verify.look(inputs, lambda: compute(model, dict(inputs), num_items_in_batch=num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        """The model's loss, plus l1 * sum |a| and the penalty while training."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
        if not model.training:
            return result
        loss = result[0] if return_outputs else result
        if self.shared is not None:
            loss = self.shared.part_of_labels(loss, self._is_counted(options))
        if self._parts:
            loss = loss * self._parts.popleft()
        total = self.noted_loss(loss, self.current_gradient_accumulation_steps)
        if _DIVIDES_UNASKED and self.compute_loss_func is None and not self._is_counted(options):
            total = total * self.current_gradient_accumulation_steps
        return (total, result[1]) if return_outputs else total

    def _is_counted(self, options: Mapping) -> bool:
        """Whether the model divides its loss by the number of labels that a call comes with."""
        return self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's; of a batch of which this process has a share, the loss is that of the whole batch."""
        inputs = dict(inputs)
        share = inputs.pop(SHARE, None)
        count = labels_counted(inputs) if share is None else torch.tensor(share.labels)
        loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if share is not None:
            self.shared.share = share
            loss = ranks.summed(self.shared.part_of_labels(loss, counted=False))
        self._evaluated.append((loss.double(), count.to(loss.device)))
        return loss, *others

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Trainer's, with the mean over all labels for a loss: its own, of batches' means, depends on their size."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            losses, counts = map(torch.stack, zip(*self._evaluated, strict=True))
            output.metrics[f"{metric_key_prefix}_loss"] = ((losses * counts).sum() / counts.sum()).item()
        return output

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


class _EpochReport(TrainerCallback):
    """Calls on_epoch once the epoch, and its evaluation if there is one, is over."""

    def __init__(self, trainer: AttachmentTraining) -> None:
        self.trainer = trainer
        self.devices = devices_of(trainer.handle.model)
        self.report: dict | None = None

    def on_train_begin(self, args, state, control, **_):
        # after a checkpoint was loaded
        ranks.as_first(parameter.data for parameter in self.trainer.handle.parameters())

    def on_epoch_begin(self, args, state, control, **_):
        if args.device.type == "cpu":
            release_free_memory()
        self.trainer.watch.begin(state.global_step, math.ceil(state.max_steps / state.num_train_epochs))
        wait_for(self.devices)
        self.started = time.perf_counter()

    def on_epoch_end(self, args, state, control, **_):
        trainer = self.trainer
        wait_for(self.devices)
        seconds = time.perf_counter() - self.started
        trainer.watch.check()
        trainer.check_numbers()
        steps = trainer.losses.take()
        self.report = {
            # the last may have been cut short
            "epoch": math.ceil(state.epoch - 1e-6),
            "loss": sum(steps) / len(steps),
            "l1": trainer.l1_term().item(),
            "seconds": seconds,
            "step_losses": [round(value, 5) for value in steps],
        }
        if trainer.eval_dataset is None:
            self._send()

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if self.report is not None:
            loss = metrics["eval_loss"]
            if not math.isfinite(loss):
                raise self.trainer.watch.failed("loss of the evaluation data", loss)
            self.report["eval_loss"] = loss
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
    if device is not None or is_offloaded(trainer.handle.model):
        trainer.accelerator.device_placement = False


def report_epochs(trainer: AttachmentTraining, shown: Shown | None = None) -> None:
    """Give a trainer `losses` for every step's loss, a `watch`, a report to its `on_epoch`, and a quiet progress bar.

    shown: a short text of an example, by its number from 0.
    """
    at_once = not runs_ahead(device_of(trainer.handle.model))
    steps = trainer.args.gradient_accumulation_steps
    trainer.losses, trainer.saved = StepLosses(), []
    trainer.shared = shared_steps(trainer.handle.model, trainer.args.seed)
    trainer.watch = FiniteSteps(at_once, steps, shown, trainer.last_good)
    trainer.remove_callback(PrinterCallback)
    if any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_QuietProgress)
    if sharers(trainer.handle.model) < ranks.count():
        trainer.add_callback(AlikeSteps(trainer.handle.model, trainer.handle.parameters, trainer.losses.last))
    trainer.add_callback(_EpochReport(trainer))
    if ranks.count() > 1:
        # these decide by the step alone
        steady = (DefaultFlowCallback, ProgressCallback, AlikeSteps, _EpochReport)
        others = [one for one in trainer.callback_handler.callbacks if not isinstance(one, steady)]
        trainer.add_callback(AgreedControl(bool(others)))


def _numbers(dataset: Rows | list | None) -> dict[int, int]:
    """id of a row -> its number, for data whose rows are the same objects whenever they are asked for."""
    rows = dataset.rows if isinstance(dataset, Rows) else dataset
    return {id(row): number for number, row in enumerate(rows)} if isinstance(rows, list) else {}
