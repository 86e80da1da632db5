"""Losses and gradients that are not finite: noticed before anything is saved, with the step and its examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

# examples that are told by number, and by text, and how much of it
_NUMBERED, _QUOTED, SHOWN = 16, 3, 40
Shown = Callable[[int], str]


class Diverged(FloatingPointError):
    """A training has met a number that is not finite. step: counted from 1. epoch: so far. examples: from 1 too."""

    def __init__(self, message: str, step: int, epoch: float, examples: Sequence[int]) -> None:
        super().__init__(message)
        self.step, self.epoch, self.examples = step, epoch, list(examples)

    def __reduce__(self) -> tuple:
        # processes of a run hand it to each other
        return type(self), (str(self), self.step, self.epoch, self.examples)


class FiniteSteps:
    """Looks at the losses and gradients of an epoch's steps: at once on a CPU, at the end of the epoch elsewhere.

    Reading a number from an accelerator makes the host wait for it, so there the numbers stay until the epoch is over.
    A batch is what one forward pass takes; accumulation of them are an optimizer step.

    at_once: whether each number is looked at when it is there. accumulation: batches per step. shown: a short text of
    an example by its number, counted from 0. last_good: the newest checkpoint, or None.
    """

    def __init__(
        self, at_once: bool, accumulation: int, shown: Shown | None, last_good: Callable[[], Path | None]
    ) -> None:
        self.at_once, self.accumulation, self.shown, self.last_good = at_once, accumulation, shown, last_good
        self.made: list[list[int]] = []
        self.begin(0, 0)

    def begin(self, step: int, steps_in_epoch: int) -> None:
        """An epoch begins. step: optimizer steps before it. steps_in_epoch: of a whole one."""
        self.before, self.steps_in_epoch = step, max(1, steps_in_epoch)
        self.made.clear()
        self.seen: dict[str, list[Tensor]] = {"loss": [], "gradient's norm": []}

    def loss(self, loss: Tensor) -> None:
        """The loss of the next batch. Raises Diverged as the class says."""
        self._see("loss", loss)

    def gradient(self, parameters: Iterable[Tensor]) -> None:
        """What the batches of a step so far have left in the parameters' gradients. Raises Diverged."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            self.norm(norm_of(gradients))

    def norm(self, norm: Tensor) -> None:
        """A norm that is finite where those gradients are. Raises Diverged."""
        self._see("gradient's norm", norm)

    def check(self) -> None:
        """The epoch is over: look at all that nobody has looked at yet. Raises Diverged."""
        wrong = []
        for what, values in self.seen.items():
            read = torch.stack([value.float() for value in values]).tolist() if values else []
            wrong += [(batch, what, value) for batch, value in enumerate(read) if not math.isfinite(value)]
        if wrong:
            # of one batch the loss comes first
            batch, what, value = min(wrong, key=lambda found: found[0])
            raise self._diverged(what, value, batch)

    def check_numbers(self, named: Mapping[str, Iterable[Tensor]]) -> None:
        """Raise Diverged, naming the last step, for numbers that it has left: {"vectors": tensors, ...}."""
        for what, tensors in named.items():
            if not all_finite(tensors):
                raise self._diverged(what, None, max(0, len(self.seen["loss"]) - 1))

    def failed(self, what: str, value: float | None) -> Diverged:
        """The error of a number that is of no batch: an evaluation's loss."""
        step = self.before + math.ceil(len(self.seen["loss"]) / self.accumulation)
        return self._error(f"{_said(what, value)} after step {step}", step, [])

    def _see(self, what: str, value: Tensor) -> None:
        values = self.seen[what]
        values.append(value.detach())
        if self.at_once and not math.isfinite(number := value.item()):
            raise self._diverged(what, number, len(values) - 1)

    def _diverged(self, what: str, value: float | None, batch: int) -> Diverged:
        step = self.before + batch // self.accumulation + 1
        examples = self.made[batch] if batch < len(self.made) else []
        on = f" on {self._named(examples)}" if examples else ""
        return self._error(f"{_said(what, value)} in step {step}{on}", step, examples)

    def _error(self, said: str, step: int, examples: Sequence[int]) -> Diverged:
        epoch, good = step / self.steps_in_epoch, self.last_good()
        kept = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good}"
        message = (
            f"{said} (epoch {epoch:.2f}): training diverged; {kept}; try a lower learning rate, or float32 in another "
            "folder"
        )
        return Diverged(message, step, epoch, [number + 1 for number in examples])

    def _named(self, examples: Sequence[int]) -> str:
        numbers = ", ".join(str(number + 1) for number in examples[:_NUMBERED])
        more = f" and {len(examples) - _NUMBERED} more" if len(examples) > _NUMBERED else ""
        texts = [] if self.shown is None else [repr(self.shown(number)) for number in examples[:_QUOTED]]
        quoted = f" ({', '.join(texts)}{', ...' if len(examples) > _QUOTED else ''})" if texts else ""
        return f"example{'s' * (len(examples) > 1)} {numbers}{more}{quoted}"


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of tensors taken together, in float32 at least, on the first one's device: what is clipped."""
    on: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        on.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms = [norm for group in on.values() for norm in torch._foreach_norm(group)]
    wide = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, wide) for norm in norms]))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is. Reads one from each device."""
    on: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            on.setdefault(tensor.device, []).append(tensor.detach())
    return all(bool(torch.stack([t.isfinite().all() for t in group]).all()) for group in on.values())


def _said(what: str, value: float | None) -> str:
    return f"the {what} are not finite" if value is None else f"the {what} is {value}"
