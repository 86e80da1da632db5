"""No peer is timed before its loss is right."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers.hook import HookLofit, Vectors
from benchmarks.speed.step.rows import Live
from benchmarks.speed.step.steps import vectors
from benchmarks.speed.step.workload import Workload, stock_batches
from lofit_fast.data.encode import Encoded

CHECK_STDS = (0.1, 0.3, 1.0, 3.0, 10.0)
# examples of the batch
_SIZE = 4


@dataclass(frozen=True)
class Reference:
    """What a row's loss on one batch must be: the plain hook's (LoFiT) or the base model's (others) in wider floats.

    step: a key of STEPS, "" for the base model. std: of the vectors that the loss is with. tolerance: twice the largest
    error that the plain hook (or the base) makes in the timed dtype on an example of the batch, or one unit in the last
    place of that dtype at the loss.
    """

    step: str
    std: float
    loss: float
    tolerance: float


@dataclass(frozen=True)
class Check:
    """A peer's loss on the batch of its reference. ok: whether it is within the tolerance."""

    loss: float
    reference: float
    tolerance: float
    ok: bool

    def as_dict(self) -> dict:
        """Plain data for the results."""
        return asdict(self)


def references(base: nn.Module, work: Workload, steps: Iterable[str]) -> dict[str, Reference]:
    """What the losses must be, by step, of rows in models like this one.

    The vectors are large for this, so that a peer that ignored them would be seen. Raises ValueError where none of
    CHECK_STDS makes a difference well beyond the tolerance.
    """
    weight = next(base.parameters())
    exact = copy.deepcopy(base).to(torch.float64 if weight.dtype == torch.float32 else torch.float32)
    return {step: _reference(base, exact, work, step) for step in steps}


class Checks:
    """The check of one row; made before its peer is put into the model, since the heads are those of the base."""

    def __init__(self, base: nn.Module, work: Workload, reference: Reference) -> None:
        self.work, self.reference = work, reference
        self._large = vectors(base, reference.step, reference.std) if reference.step else {}
        self._start = vectors(base, reference.step) if reference.step else {}

    def __call__(self, live: Live) -> Check:
        """Check the row; its vectors come back as they were."""
        batch = live.batches(_rows(self.work), self.work.pad)[0]
        if self.reference.step:
            live.attached.assign(self._large)
        # with its graph: a compiled model would otherwise be compiled once more, for inference
        loss = live.loss(batch).item()
        if self.reference.step:
            live.attached.assign(self._start)
        expected, tolerance = self.reference.loss, self.reference.tolerance
        return Check(loss, expected, tolerance, abs(loss - expected) <= tolerance)


def _rows(work: Workload) -> list[Encoded]:
    return work.drawn(0, _SIZE)


def _reference(base: nn.Module, exact: nn.Module, work: Workload, step: str) -> Reference:
    weight = next(base.parameters())
    together = _batch(_rows(work), work.pad, weight.device)
    unchanged = _loss(exact, together, {})
    for std in CHECK_STDS if step else (0.0,):
        values = vectors(base, step, std) if step else {}
        loss = _loss(exact, together, values)
        single = [_batch([row], work.pad, weight.device) for row in _rows(work)]
        error = max(abs(_loss(base, one, values) - _loss(exact, one, values)) for one in single)
        tolerance = max(2 * error, torch.finfo(weight.dtype).eps * 2.0 ** math.floor(math.log2(loss)))
        if not step or abs(unchanged - loss) > 4 * tolerance:
            return Reference(step, std, loss, tolerance)
    raise ValueError(f"{step}: no vectors of the check change the loss visibly, so it would prove nothing")


def _batch(rows: list[Encoded], pad: int, device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in stock_batches(rows, pad)[0].items()}


@torch.no_grad()
def _loss(model: nn.Module, batch: dict[str, Tensor], values: Vectors) -> float:
    hook = HookLofit(model, values)
    try:
        return model(**batch, use_cache=False).loss.item()
    finally:
        hook.remove()
