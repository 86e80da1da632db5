"""No peer is timed before its loss is right.

The loss is a mean over a handful of tokens, whose rounding errors may cancel by luck: one hook's loss can be a hundred
times nearer to the exact one than another's that is just as right. So the tolerance is not taken from losses. It is
taken from the errors of the single tokens: the mean of some numbers is never larger than their root mean square, so
that a loss cannot be further off than that, however the tokens' errors hang together. The plain hook's own root mean
square is measured on the very batch, in training mode as it is timed: under every attention that a row may use, in the
opposite order of the examples, and with the examples one by one. The largest counts.

The exact loss is computed here from the logits of the model in wider floats. The loss of the models' own code would not
do: it rounds logits to float32 first, and sums over the vocabulary in float32, with an error that depends on the
processor's instructions and on the number of positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.peers.hook import HookLofit, Vectors
from benchmarks.speed.step.row_settings import STOCK
from benchmarks.speed.step.rows import Live
from benchmarks.speed.step.steps import vectors
from benchmarks.speed.step.workload import Workload, stock_batches
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.training.engine import prepared
from lofit_fast.training.engine.attention_scope import UnusableAttention
from lofit_kernels.error_bound import bound_of

CHECK_STDS = (0.1, 0.3, 1.0, 3.0, 10.0)
# vectors that are wrong by this share of themselves are to be noticed
FAULT = 0.01
# examples of the batch
_SIZE = 4


@dataclass(frozen=True)
class Reference:
    """What a row's loss on one batch must be: the plain hook's (LoFiT) or the base model's (others) in wider floats.

    step: a key of STEPS, "" for the base model. std: of the vectors that the loss is with. tolerance: the accuracy rule
    applied to the root mean square of the plain hook's (or the base's) errors at single tokens, in the timed dtype.
    fault: by how much the loss changes with vectors that are wrong by FAULT; 0 for the base model.
    """

    step: str
    std: float
    loss: float
    tolerance: float
    fault: float = 0.0


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

    The vectors are the smallest of CHECK_STDS whose fault of 1 % shows beyond any rounding. In 16 bits the rounding of
    a model is larger than such a fault: there they are the smallest that a peer cannot ignore without being seen.
    Raises ValueError where none of CHECK_STDS makes such a difference.
    """
    weight = next(base.parameters())
    exact = copy.deepcopy(base).to(torch.float64 if weight.dtype == torch.float32 else torch.float32)
    return {step: _reference(base, exact, work, step) for step in steps}


class Checks:
    """The check of one row; made before its peer is put into the model, since the heads are those of the base."""

    def __init__(self, base: nn.Module, work: Workload, reference: Reference) -> None:
        self.work, self.reference = work, reference
        self.large = vectors(base, reference.step, reference.std) if reference.step else {}
        self._start = vectors(base, reference.step) if reference.step else {}

    def __call__(self, live: Live) -> Check:
        """Check the row; its vectors come back as they were."""
        batch = live.batches(rows_of(self.work), self.work.pad)[0]
        if self.reference.step:
            live.attached.assign(self.large)
        # with its graph: a compiled model would otherwise be compiled once more, for inference
        loss = live.loss(batch).item()
        if self.reference.step:
            live.attached.assign(self._start)
        expected = self.reference.loss
        tolerance = self.reference.tolerance + live.row.how.slack * abs(expected)
        return Check(loss, expected, tolerance, abs(loss - expected) <= tolerance)


def rows_of(work: Workload) -> list[Encoded]:
    return work.drawn(0, _SIZE)


def _reference(base: nn.Module, exact: nn.Module, work: Workload, step: str) -> Reference:
    rows, pad, dtype = rows_of(work), work.pad, next(base.parameters()).dtype
    unchanged = _exact_losses(exact, rows, pad, {})
    if not step:
        loss = unchanged.mean().item()
        return Reference(step, 0.0, loss, bound_of(own_error(base, unchanged, rows, pad, {}), loss, dtype))
    fallback = None
    for std in CHECK_STDS:
        values = vectors(base, step, std)
        right = _exact_losses(exact, rows, pad, values)
        wrong = _exact_losses(exact, rows, pad, {key: (heads, (1 + FAULT) * x) for key, (heads, x) in values.items()})
        loss, fault = right.mean().item(), (wrong - right).mean().abs().item()
        tolerance = bound_of(own_error(base, right, rows, pad, values), loss, dtype)
        found = Reference(step, std, loss, tolerance, fault)
        # one tolerance for the rounding of a right peer, another for that of the wrong one
        if fault > 2 * tolerance:
            return found
        if abs(unchanged.mean().item() - loss) > 4 * tolerance:
            if torch.finfo(dtype).bits < 32:
                return found
            fallback = fallback or found
    if fallback is None:
        raise ValueError(f"{step}: no vectors of the check change the loss visibly, so it would prove nothing")
    return fallback


def own_error(base: nn.Module, right: Tensor, rows: Sequence[Encoded], pad: int, values: Vectors) -> float:
    """The largest root mean square of the plain hook's errors at single tokens. right: their exact losses."""
    ways = [
        token_losses(base, rows[::-1], pad, values)[::-1],
        [token_losses(base, [row], pad, values)[0] for row in rows],
    ]
    for attention in dict.fromkeys((base.config._attn_implementation, "sdpa", "eager")):
        # a model with caps on its scores has no sdpa
        with suppress(UnusableAttention), prepared(base, replace(STOCK, attention=attention)):
            ways.append(token_losses(base, rows, pad, values))
    return max((torch.cat(losses) - right).square().mean().sqrt().item() for losses in ways)


@torch.no_grad()
def _exact_losses(exact: nn.Module, rows: Sequence[Encoded], pad: int, values: Vectors) -> Tensor:
    return torch.cat(token_losses(exact, rows, pad, values))


def token_losses(model: nn.Module, rows: Sequence[Encoded], pad: int, values: Vectors) -> list[Tensor]:
    """The loss at every labelled token, (n,) float64: with the plain hook in the model, in training mode."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in stock_batches(rows, pad)[0].items()}
    # the label of a position is the token after it
    labels = nn.functional.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
    hook, training = HookLofit(model, values), model.training
    try:
        logits = model.train()(**batch, use_cache=False).logits.detach()
    finally:
        hook.remove()
        model.train(training)
    # as the models' own loss: in float32 at least, and over all positions, since its rounding depends on their number
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    losses = cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="none").double().view_as(labels)
    return [row[labelled] for row, labelled in zip(losses, labels != IGNORED, strict=True)]
