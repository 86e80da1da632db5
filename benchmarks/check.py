"""No provider is timed before its loss is right."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.providers import PROVIDERS
from benchmarks.settings import Live
from benchmarks.steps import vectors
from benchmarks.workload import Workload, stock_batches
from lofit_fast.baselines.hook import HookLofit, Vectors
from lofit_fast.encoding import Encoded

CHECK_STDS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Check:
    """A provider's loss on one batch, against the plain hook's (LoFiT) or the base model's (others) in wider floats.

    tolerance: twice the largest error that the plain hook (or the base) makes in the timed dtype on an example of the
    batch, or one unit in the last place of that dtype at the reference. ok: whether the loss is that near.
    """

    loss: float
    reference: float
    tolerance: float
    ok: bool

    def as_dict(self) -> dict:
        """Plain data for the results."""
        return asdict(self)


class Checks:
    """References for one model and batch, made once per step and kept.

    The vectors are large for this, so that a provider that ignored them would be seen. Raises ValueError where none of
    CHECK_STDS makes a difference well beyond the tolerance.
    """

    def __init__(self, base: nn.Module, work: Workload, size: int = 4) -> None:
        self.base, self.work, self.rows = base, work, work.drawn(0, size)
        self._references: dict[str, tuple[Vectors, float, float]] = {}

    def __call__(self, live: Live) -> Check:
        """Check one row; its vectors come back as they were."""
        lofit = PROVIDERS[live.row.provider].lofit
        step = live.row.step if lofit else ""
        if step not in self._references:
            self._references[step] = self._made(step)
        values, reference, tolerance = self._references[step]
        batch = live.batches(self.rows, self.work.pad)[0]
        if lofit:
            live.attached.assign(values)
        # with its graph: a compiled model would otherwise be compiled once more, for inference
        loss = live.loss(batch).item()
        if lofit:
            live.attached.assign(vectors(self.base, step))
        return Check(loss, reference, tolerance, abs(loss - reference) <= tolerance)

    def _made(self, step: str) -> tuple[Vectors, float, float]:
        weight = next(self.base.parameters())
        exact = copy.deepcopy(self.base).to(torch.float64 if weight.dtype == torch.float32 else torch.float32)
        together = self._batch(self.rows, weight.device)
        unchanged = _loss(exact, together, {})
        for std in CHECK_STDS if step else (0.0,):
            values = vectors(self.base, step, std) if step else {}
            reference = _loss(exact, together, values)
            tolerance = self._tolerance(exact, values, reference)
            if not step or abs(unchanged - reference) > 4 * tolerance:
                return values, reference, tolerance
        raise ValueError(f"{step}: no vectors of the check change the loss visibly, so it would prove nothing")

    def _tolerance(self, exact: nn.Module, values: Vectors, reference: float) -> float:
        weight = next(self.base.parameters())
        single = [self._batch([row], weight.device) for row in self.rows]
        error = max(abs(_loss(self.base, one, values) - _loss(exact, one, values)) for one in single)
        return max(2 * error, torch.finfo(weight.dtype).eps * 2.0 ** math.floor(math.log2(reference)))

    def _batch(self, rows: list[Encoded], device: torch.device) -> dict[str, Tensor]:
        batch = stock_batches(rows, self.work.pad)[0]
        return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def _loss(model: nn.Module, batch: dict[str, Tensor], values: Vectors) -> float:
    hook = HookLofit(model, values)
    try:
        return model(**batch, use_cache=False).loss.item()
    finally:
        hook.remove()
