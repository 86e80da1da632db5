"""Ending step 1 early: once the best heads no longer change, more epochs only polish scales that are thrown away."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.trainer_callback import ExportableState

from lofit_fast import ranks
from lofit_fast.config import Head, check_top
from lofit_fast.files import same_json
from lofit_fast.heads import jaccard, select_heads
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.head_norms import head_scores
from lofit_fast.patching.patched import handle_of
from lofit_fast.training.closed_callbacks import ClosedCallback


@dataclass
class SettledHeads(ClosedCallback, ExportableState):
    """Stops step 1 when the top heads have settled; leaves step 2, and any training with offsets, alone.

    top, min_layer: as in the recipe. every: optimizer steps between two looks; None means half an epoch. threshold,
    patience: stop after this many looks in a row that share at least this much (Jaccard) with the look before.
    The learning rate still falls as for all epochs, so that a run cut short is the beginning of the whole one.
    A checkpoint keeps what it has seen, so that a resumed run stops where it would have. Afterwards `overlaps` has
    every look's overlap with the one before, and `stopped_at` the step it stopped after, or None.
    """

    top: int | float
    min_layer: int = 0
    every: int | None = None
    threshold: float = 0.9
    patience: int = 2
    overlaps: list[float] = field(default_factory=list, init=False)
    stopped_at: int | None = field(default=None, init=False)
    _before: list[Head] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_top(self.top)
        if self.every is not None and self.every < 1:
            raise ValueError(f"expected every to be None or >= 1 step, got {self.every}")
        if not 0 < self.threshold <= 1 or self.patience < 1:
            raise ValueError(f"expected threshold in (0, 1] and patience >= 1, got {self.threshold}, {self.patience}")

    @property
    def identity(self) -> dict[str, object]:
        """What decides when it stops: runs that differ in it are different runs, see `fit`."""
        settings = ("top", "min_layer", "every", "threshold", "patience")
        return {"early_stop": {name: getattr(self, name) for name in settings}}

    def state(self) -> dict:
        """What Trainer writes into a checkpoint's trainer_state.json."""
        settings = self.identity["early_stop"]
        seen = {"overlaps": list(self.overlaps), "before": self._before}
        # transformers builds a new callback from "args" and "attributes", where it is asked to
        return {"args": settings, "attributes": {}, "seen": seen}

    def on_train_begin(self, args, state, control, model=None, **_):
        """A training begins: is it one of scales alone, which step 2 never is?"""
        handle = handle_of(model)
        scaled = handle is not None and handle.config.scale is not None and handle.config.offset is None
        self._handle: LofitHandle | None = handle if scaled else None
        # a checkpoint of an earlier release has nothing of it
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self._handle is not None:
            self.overlaps, self.stopped_at, self._before = [], None, None
            self._steps = self.every or max(1, round(state.max_steps / state.num_train_epochs / 2))
            if state.global_step > 0:
                self._go_on(state.stateful_callbacks[type(self).__name__])

    def on_step_end(self, args, state, control, **_):
        """Look, and stop if nothing has changed for long enough."""
        if self._handle is None or state.global_step % self._steps:
            return
        # all processes of a run stop at the same step
        heads = ranks.told(lambda: select_heads(head_scores(self._handle), self.top, self.min_layer))
        if self._before is not None:
            self.overlaps.append(jaccard(heads, self._before))
        self._before = heads
        last = self.overlaps[-self.patience :]
        if len(last) == self.patience and min(last) >= self.threshold:
            self.stopped_at = state.global_step
            control.should_training_stop = True

    def close(self) -> None:
        """Let go of the model."""
        self._handle = None

    def _go_on(self, written: dict | list) -> None:
        """What a checkpoint kept; of several callbacks of this name that of the same settings."""
        candidates = written if isinstance(written, list) else [written]
        settings = self.identity["early_stop"]
        ours = [one for one in candidates if same_json(one.get("args"), settings) and "seen" in one]
        if ours:
            seen = ours[-1]["seen"]
            self.overlaps = list(seen["overlaps"])
            self._before = None if seen["before"] is None else [tuple(pair) for pair in seen["before"]]
