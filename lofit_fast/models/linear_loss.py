"""Log-probabilities of tokens from what enters a frozen output head, without logits of all rows at once.

    z = h W^T + b,   l = f(z),   log p = l[target] - logsumexp(l)
    d log p / dh = (f'(z) * (onehot(target) - softmax(l))) W

f scales logits and caps them, see `FrozenHead`. A row's log p depends on its own row of h alone, so the derivative is
computed with the chunk's logits, in the forward pass, and kept: (rows, N) in the place of (rows, vocabulary). The
backward pass multiplies each row of it by a number. That is as many products as with all logits, and no weight has a
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# bytes of float32 logits from which they are made in chunks, and bytes of a chunk's. counts, the same everywhere
LONG = 2**30
CHUNK = 2**28


@dataclass(frozen=True)
class FrozenHead:
    """An output head that is not trained, and what a model makes of its logits.

    module: the head, or None where only numbers are wanted. weight: (vocabulary, N). bias: (vocabulary,) or None.
    multiply, divide: of the logits, None for not at all; at most one of them. cap: c of c * tanh(z / c), after that, or
    None.
    """

    module: nn.Module | None
    weight: Tensor
    bias: Tensor | None = None
    multiply: float | None = None
    divide: float | None = None
    cap: float | None = None

    def after(self, logits: Tensor) -> Tensor:
        """f of logits (..., vocabulary), in their dtype and in the order of operations of transformers' models."""
        return self.steps(logits)[0]

    def steps(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """f of logits, and the tanh in it, or None without a cap."""
        if self.multiply is not None:
            logits = logits * self.multiply
        if self.divide is not None:
            logits = logits / self.divide
        if self.cap is None:
            return logits, None
        bent = torch.tanh(logits / self.cap)
        return bent * self.cap, bent

    def is_long(self, rows: int) -> bool:
        """Whether logits of so many rows are made in chunks."""
        return rows * self.weight.shape[0] * 4 > LONG

    def chunk(self) -> int:
        """Rows of a chunk."""
        return max(1, CHUNK // (self.weight.shape[0] * 4))


class Watched(NamedTuple):
    """What is logged of the labelled rows, each (rows,): float32 or more, is_top1 bool. Without gradients."""

    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_log_probs(hidden: Tensor, head: FrozenHead, targets: Tensor, watch: bool = False):
    """log p of a target per row, a chunk of rows at a time.

    hidden: (rows, N). targets: (rows,) int64, ids of the vocabulary. watch: whether `Watched` is wanted too.
    Returns ((rows,) in float32 at least, with a gradient for hidden alone; Watched or None).
    """
    targets = targets.to(hidden.device)
    log_probs, *watched = _ChunkedLogProbs.apply(hidden, head, targets, watch)
    return log_probs, Watched(*watched) if watch else None


class _ChunkedLogProbs(torch.autograd.Function):
    """See the equations above."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: FrozenHead, targets: Tensor, watch: bool):
        wants = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wants else None
        parts = []
        # no rows are a chunk too
        for start in range(0, max(1, len(hidden)), head.chunk()):
            at = slice(start, start + head.chunk())
            part = _chunk(hidden[at], head, targets[at], watch, None if slope is None else slope[at])
            parts.append(part)
        ctx.save_for_backward(slope)
        joined = tuple(map(torch.cat, zip(*parts, strict=True)))
        ctx.mark_non_differentiable(*joined[1:])
        return joined

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def _chunk(hidden: Tensor, head: FrozenHead, targets: Tensor, watch: bool, slope: Tensor | None) -> tuple[Tensor, ...]:
    """(log p, and what is watched) of a chunk's rows. slope: (rows, N), filled with d log p / dh."""
    logits, bent = head.steps(linear(hidden, head.weight, head.bias))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # in 16 bits these are a copy that nobody needs now
    del logits
    norm = wide.logsumexp(1)
    places = targets[:, None]
    found = (wide.gather(1, places)[:, 0] - norm,)
    if watch:
        found += (norm - ((wide - norm[:, None]).exp() * wide).sum(1), wide.mean(1), wide.argmax(1) == targets)
    if slope is not None:
        # in place: these logits are nobody else's
        away = wide.sub_(norm[:, None]).exp_().neg_()
        away.scatter_add_(1, places, torch.ones_like(places, dtype=away.dtype))
        if bent is not None:
            away.mul_(1 - bent.to(away.dtype).square())
        factor = (head.multiply or 1.0) / (head.divide or 1.0)
        slope.copy_((away.mul_(factor) if factor != 1.0 else away).to(hidden.dtype) @ head.weight.to(hidden.dtype))
    return found
