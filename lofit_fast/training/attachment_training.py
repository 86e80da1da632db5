"""What transformers' Trainer lacks to train an attachment: an L1 term, checkpoints of it alone, losses of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lofit_fast import ranks
from lofit_fast.patching.placement import is_offloaded
from lofit_fast.patching.storage import read_adapter
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.device_queue import Sender
from lofit_fast.training.finite_steps import FiniteSteps, norm_of
from lofit_fast.training.shared_batches import SharedSteps
from lofit_fast.training.stage_checkpoints import OURS, keep_newest, written_whole
from lofit_fast.training.verify_steps import StepCheck


class AttachmentTraining:
    """What a trainer of transformers lacks to train an attachment: an L1 term, checkpoints of it alone, epoch reports.

    Mixed into a Trainer. handle: the attachment; checkpoints need a LofitHandle. l1: weight of sum |a| over all of a
    handle's scales, or over the offsets of one without scales. on_epoch: called with a dict after every epoch: epoch,
    loss (mean over its steps, without the L1 term), l1 (the term's last value), seconds, step_losses, and eval_loss
    where there is an evaluation set.

    losses, watch, sender: set by `report_epochs` and `leave_in_place`. shared: what the processes of a run put
    together; None where they share no batches. rate: the learning rate that a resumed training goes on with, where that
    is not the one of its checkpoint. saved: the steps of the checkpoints that are known to be whole. verify: what looks
    at batches of new shapes first.
    """

    handle: Attachment
    l1: float
    on_epoch: Callable[[dict], None]
    losses: StepLosses
    watch: FiniteSteps
    saved: list[int]
    sender: Sender | None = None
    shared: SharedSteps | None = None
    verify: StepCheck | None = None
    rate: float | None = None
    _scratch: Path | None = None

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
        # labels are counted where they are
        counted_on = device if self.sender is None else torch.device("cpu")
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, counted_on)
        self.begin_step(batches)
        if self.shared is not None:
            n_labels = self.shared.begin(batches)
            items = None if items is None else items.new_tensor(n_labels)
        if self.sender is None:
            return batches, items
        return self.sender.send(batches), self.sender.count(items)

    def begin_step(self, batches: Sequence[Mapping]) -> None:
        """The batches of a step are here, still where they were made."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's: forward and backward of a batch, whose gradients must be finite."""
        if self.shared is not None:
            return self._shared_step(model, inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._scales():
            self.watch.gradient(self.handle.parameters())
        return loss

    def _shared_step(self, model, inputs, num_items_in_batch) -> Tensor:
        """A batch of which this process has a share. Numbers are looked at where all processes have them: after the
        last batch of a step, when gradients are summed."""
        shared = self.shared
        shared.next()
        with shared.drawing(self.state.global_step):
            total = super().training_step(model, inputs, num_items_in_batch)
        gradients = [p.grad for p in self.handle.parameters() if p.grad is not None]
        norm = torch.zeros_like(total) if self._scales() or not gradients else norm_of(gradients)
        shared.saw(self._part, total, norm)
        if not shared.ends:
            # Trainer adds up what it is given: all of it comes with the last one
            return torch.zeros_like(total)
        summed = shared.exchanged(self.handle.parameters())
        for loss, _, norm in summed:
            self.losses.add(loss, 1 / len(summed))
            self.watch.loss(loss)
            self.watch.norm(norm)
        return torch.stack([total for _, total, _ in summed]).sum().to(total.device, total.dtype)

    def _scales(self) -> bool:
        """Whether 16-bit gradients are scaled: what does so finds infinities, and steps over them, by itself."""
        return getattr(self.accelerator, "scaler", None) is not None

    def noted_loss(self, loss: Tensor, batches: int) -> Tensor:
        """A batch's loss, noted, with its part of what is added to a step's. batches: of a step."""
        if self.shared is None:
            self.losses.add(loss.detach(), 1 / batches)
            self.watch.loss(loss)
        else:
            self._part = loss.detach()
            # what is added is added once
            if not ranks.first():
                return loss
        return loss + self.extra_loss().to(loss.device) / batches

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # what is offloaded is brought for each forward, and is nowhere now
        if not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def noted(self, collate: Callable, number_of: Callable[[object], int | None]) -> Callable:
        """A collator that notes which examples each batch has, by a row's number; rows without one are let pass."""

        def collated(rows):
            numbers = [number for number in map(number_of, rows) if number is not None]
            if numbers:
                self.watch.made.append(numbers)
            return collate(rows)

        return collated

    def check_numbers(self) -> None:
        """Raise FloatingPointError where the vectors, or what the optimizer keeps of them, are not finite."""
        kept = getattr(self.optimizer, "state", None) or {}
        moments = [value for state in kept.values() for value in state.values() if torch.is_tensor(value)]
        self.watch.check_numbers({"vectors": self.handle.parameters(), "optimizer's moments": moments})

    def last_good(self) -> Path | None:
        """The newest checkpoint that this training has written, or gone on from."""
        return Path(self.args.output_dir) / f"checkpoint-{self.saved[-1]}" if self.saved else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # the frozen base is in the cache already: a checkpoint is the adapter
        self.handle.save(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, but whole or not at all, and of finite numbers alone. What else is in the folder stays there."""
        self.watch.check()
        self.check_numbers()
        args, step = self.args, self.state.global_step
        # these know a checkpoint by the place where it is written
        if args.world_size > 1 or args.push_to_hub or args.metric_for_best_model is not None:
            super()._save_checkpoint(model, trial)
            return
        save = super()._save_checkpoint

        def write() -> None:
            try:
                ends = self.control.should_training_stop
                with written_whole(args.output_dir, step, self.state.epoch or 0.0, ends) as self._scratch:
                    save(model, trial)
            finally:
                self._scratch = None
            if args.save_total_limit is not None and args.save_total_limit > 0:
                keep_newest(args.output_dir, self._kept(step))

        ranks.by_first(write)
        self.saved = self._kept(step)

    def _kept(self, step: int) -> list[int]:
        """The steps of the checkpoints that are left, once that of a step is written."""
        saved, limit = [*(before for before in self.saved if before != step), step], self.args.save_total_limit
        return saved[-limit:] if limit is not None and limit > 0 else saved

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._scratch is None else str(self._scratch)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.handle.take(read_adapter(resume_from_checkpoint))
        match = OURS.fullmatch(Path(resume_from_checkpoint).name)
        self.saved = [int(match[1])] if match else []

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is None or self.rate is None or not isinstance(scheduler, LambdaLR):
            return
        # a checkpoint brings its own rate, and this run may have been told to go on with another
        scheduler.base_lrs = [self.rate] * len(scheduler.base_lrs)
        rates = [self.rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = self.rate, rate


class StepLosses:
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

    def last(self) -> float:
        """That of the last step."""
        return self.steps[-1].item()

    def take(self) -> list[float]:
        """The losses so far; starts anew."""
        losses = torch.stack(self.steps).tolist()
        self.steps = []
        return losses
