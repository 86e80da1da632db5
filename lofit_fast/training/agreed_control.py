"""What callbacks ask of a training, alike in every process of a run: what one of them asks for, all of them do."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainerCallback, TrainerControl

from lofit_fast import ranks


class AgreedControl(TrainerCallback):
    """Stops, evaluates, saves and logs in all processes where a callback has asked for it in one of them.

    A clock, a signal or a file may say stop to one process and not yet to another, and processes that go different ways
    would take each other's messages for their own. All processes must have it, as the last of a trainer's callbacks.
    needed: whether this process has callbacks that may ask; nothing is sent in steps where none has.
    """

    def __init__(self, needed: bool) -> None:
        self.needed = needed

    def on_train_begin(self, args, state, control, **_):
        """Whether any process has such callbacks."""
        self.needed = any(ranks.gathered(self.needed))

    def on_step_end(self, args, state, control, **_):
        """Agree, where a trainer looks next at what was asked for."""
        self._agree(control)

    def on_epoch_end(self, args, state, control, **_):
        """As `on_step_end`."""
        self._agree(control)

    def on_log(self, args, state, control, **_):
        """As `on_step_end`."""
        self._agree(control)

    def on_evaluate(self, args, state, control, **_):
        """As `on_step_end`."""
        self._agree(control)

    def on_save(self, args, state, control, **_):
        """As `on_step_end`."""
        self._agree(control)

    def _agree(self, control: TrainerControl) -> None:
        if self.needed:
            names = [field.name for field in fields(control) if field.name.startswith("should_")]
            asked = ranks.gathered([bool(getattr(control, name)) for name in names])
            for name, anywhere in zip(names, map(any, zip(*asked, strict=True)), strict=True):
                setattr(control, name, anywhere)
