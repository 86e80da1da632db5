"""Whether a model predicts next tokens from those before them, which training on answers takes it to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lofit_fast.data.collate import Batch, CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.models.trials import (
    SHARED,
    as_the_base,
    difference,
    rounding,
    said_of,
    trial_examples,
    tried_once,
    trying,
)
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.sharding import is_shared

# a padding id: what stands there is masked
_PAD = 0


@dataclass(frozen=True)
class _Losses:
    """Of one batch: the model's own, that of the logits with the token they stand at, and with the next one."""

    own: Tensor
    same: Tensor
    following: Tensor


@dataclass(frozen=True)
class _Seen:
    """What a trial shows. leak: by how much a text's beginning moves with the rest of it. losses: or why there are
    none."""

    leak: float
    losses: _Losses | str


def check_next_tokens(model: nn.Module, *, own_loss: bool = True) -> None:
    """Raise ValueError for a model whose tokens see those after them, or whose loss is of another kind or fails.

    The former are encoders, those of BERT's kin whose config does not say is_decoder=True, decoders whose config turns
    their causal mask off, and models with an encoder, which would read the answer there. own_loss: whether the model's
    own loss is trained on. That of the decoders of BART and its kin compares the logits at each token with that token,
    for labels that are shifted beforehand.
    Tried on a few tokens, whatever the class; where that is not possible, the config is believed.
    """
    name = type(model).__name__
    if reason := later_tokens_seen(model):
        raise ValueError(
            f"tokens of a {name} see those that come after them ({reason}), so that it would be trained on answers "
            "that it has read: expected a decoder, as BERT's kin are with is_decoder=True in their config"
        )
    seen = _tried(model)
    if not own_loss or seen is None:
        return
    losses = seen.losses
    if isinstance(losses, str):
        raise ValueError(
            f"a {name} computes logits of tokens, but no loss of them ({losses}): expected a model whose loss is of "
            "next tokens, given tokens and labels alone"
        )
    away = (losses.own - losses.same).abs()
    if away <= rounding(model) * losses.same and away < (losses.own - losses.following).abs():
        raise ValueError(
            f"the loss of a {name} compares the logits at each token with that token (it is {losses.own:.4g}; of next "
            f"tokens it would be {losses.following:.4g}), so that nothing of use is learned from it: expected a model "
            "whose loss is of next tokens, as that of decoder-only models is"
        )


def later_tokens_seen(model: nn.Module) -> str | None:
    """How it shows that a model's tokens see those after them; None where they do not.

    The model is tried, patched or not. Its config is believed where processes hold the model together, or where it
    takes more than tokens.
    """
    seen = _tried(model)
    if seen is None:
        return "attention is bidirectional by its config" if said_bidirectional(model) else None
    if seen.leak > _allowed(model):
        return f"its logits at the beginning of a text move by {seen.leak:.1e} with the rest of it"
    return None


def said_bidirectional(model: nn.Module) -> bool:
    """Whether a config says that tokens of a text see those after them, whatever the model makes of it."""
    config = text_config(model)
    # tokens of images alone see each other with "vision"
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    return both_ways or getattr(config, "is_causal", None) is False


def _tried(model: nn.Module) -> _Seen | None:
    """None where the model cannot be tried."""
    if is_shared(model):
        return None
    return tried_once(model, "next tokens", lambda: _seen(model))


def _seen(model: nn.Module) -> _Seen | None:
    first, *_, shorter = trial_examples(model)
    # as long, with another end
    other = trial_examples(model, other=True)[0]
    try:
        with trying(model), as_the_base(model):
            run = _Runs(model)
            logits, losses = run.with_losses([first, other, shorter])
            # without padding, attention may go another way
            leak = max(run.leak(logits, [shorter]), run.leak(run([first, other]), []))
        return _Seen(leak, losses)
    # it needs more than tokens, or cannot run here: training says by itself what is wrong
    except Exception:
        return None


class _Runs:
    """Forwards of one model, all with the same random numbers, by which some attention hashes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, torch.get_rng_state()
        # some make the tokens that they go on from of their labels
        self._labelled = True

    def __call__(self, rows: list[Encoded]) -> Tensor:
        """The logits (B, S, vocabulary)."""
        batch = self._batch(rows)
        if not self._labelled:
            del batch["labels"]
        return self._out(batch).logits

    def with_losses(self, rows: list[Encoded]) -> tuple[Tensor, _Losses | str]:
        """The same, and the losses, or why there are none."""
        batch = self._batch(rows)
        try:
            out = self._out(batch)
        except Exception as error:
            # whatever the forward makes of labels; if it does not run without them either, that is not it
            self._labelled = False
            return self(rows), said_of(error)
        if out.loss is None:
            return out.logits, "it is None where labels are given"
        logits, labels = out.logits.float(), batch["labels"]
        return out.logits, _Losses(out.loss.float(), _loss(logits, labels), _loss(logits[:, :-1], labels[:, 1:]))

    def _batch(self, rows: list[Encoded]) -> Batch:
        """The longest row has no padding, which may hide a part of it from itself."""
        collator = CompletionCollator(_PAD, logits="all", pad_to_multiple_of=1)
        return on_device(collator(rows), device_of(self.model))

    def _out(self, batch: Batch) -> Any:
        torch.set_rng_state(self.state)
        return self.model(**batch, use_cache=False)

    def leak(self, logits: Tensor, beside: list[Encoded]) -> float:
        """How the beginnings of the first two rows, which are alike, differ; 0 where they are no numbers.

        logits: (B, S, vocabulary), of a batch with both, and `beside`.
        """
        got, other = logits[:2, :SHARED].float()
        if not (got.isfinite().all() and other.isfinite().all()):
            return 0.0
        away = difference(got, other)
        if away <= _allowed(self.model):
            return away
        # one row may move another, as where experts have room for so many tokens of a batch: that is no leak
        pair = (trial_examples(self.model, other=which)[:1] + beside for which in (False, True))
        return difference(*(self(rows)[:1, :SHARED].float() for rows in pair))


def _allowed(model: nn.Module) -> float:
    """Of the same shapes, so that hardly a sum is in another order."""
    return rounding(model) / 10


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (B, S, vocabulary). labels: (B, S)."""
    return cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)
