"""Prompts computed once: their keys and values by the base, on disk, and training on the answers alone.

For vectors that act from the last prompt token on. What stands before it is the base's in every epoch, in every run and
under every adapter, so that runs on the same model and data share one store, whatever heads they tune.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lofit_fast.data.collate import Batch, Logits, on_device
from lofit_fast.data.encode import Encoded
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.evaluation.token_trees import common_beginning
from lofit_fast.models.base_digest import base_modules, dropout_of, identity_of
from lofit_fast.models.prompt_states import NotPlain, Slots, going_on, prompt_states
from lofit_fast.models.trials import difference, labelled_logits, rounding, said_of
from lofit_fast.patching.acting import EVERYWHERE
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.placement import device_of
from lofit_fast.training.answer_batches import AnswerCollator, Collator, prompts_of, span
from lofit_fast.training.engine.compiled_layers import uncompiled
from lofit_fast.training.engine.device_queue import pins
from lofit_fast.training.prefix_cache.proven_store import Rows, Unfit, Wanted, proven
from lofit_fast.training.prefix_cache.store import PrefixStore, digest
from lofit_kernels.answers import cache_folder

# tokens that all prompts begin with, from which on it pays to run them once
_LEAST_SHARED = 8
# what the files mean; another number is another key
_FORMAT = 2


@dataclass(frozen=True)
class _Base:
    """A patched model's base, as prompts meet it: the vectors switched off, layers uncompiled, no graph."""

    handle: LofitHandle
    model: nn.Module
    decoder: nn.Module
    device: torch.device

    @classmethod
    def of(cls, handle: LofitHandle) -> _Base:
        return cls(handle, handle.model, handle.watches.decoder, device_of(handle.model))

    def run(self, rows: Sequence[Sequence[int]], beginning: tuple[Tensor, Slots] | None = None):
        """`prompt_states` of rows, and where they lie."""
        with self.handle.disabled(), uncompiled(decoder_layers(self.model)), torch.no_grad():
            return prompt_states(self.decoder, rows, self.device, beginning)


@contextmanager
def prompts_kept(
    handle: LofitHandle,
    sequences: Sequence[Encoded],
    collator: Collator,
    *,
    pad_token_id: int,
    logits: Logits,
    gb: float,
    folder: Path | None = None,
    progress: bool = False,
) -> Iterator[Collator]:
    """A scope in which batches of the given sequences take only their answers through the model.

    Yields the collator to train with: an `AnswerCollator`, or `collator` itself where nothing is kept. Losses and
    gradients are those of whole sequences, up to rounding.
    handle: one whose vectors act on answers. sequences: all that training and evaluation will see; when their prompts
    do not all fit, the shortest are kept, and batches with others run whole. collator: makes batches of whole sequences
    for such vectors. logits: what the model can be asked for, see `CompletionCollator`.
    gb: bound on all stores in `folder` together, in 10^9 bytes; 0 keeps nothing. folder: default "prompts" in the cache
    folder of lofit-fast.
    Nothing is kept, and a warning says why, for a model that keeps more of a token than keys and values, whose passes
    differ (dropout), that recomputes its layers in the backward pass (gradient checkpointing), or whose logits or loss
    with the store are others than without; and when the disk does not take it.
    """
    if not gb:
        yield collator
        return
    answers = None
    with eval_mode(handle.model), torch.no_grad():
        try:
            base = _Base.of(handle)
            made = {"collator": collator, "pad_token_id": pad_token_id, "logits": logits}
            answers = _checked(base, sequences, made, gb, folder or cache_folder() / "prompts", progress)
        # training goes on without it, whatever a model, a batch or a disk may raise
        except Exception as error:
            known = isinstance(error, NotPlain | Unfit | OSError)
            reason = str(error) if known else f"{type(handle.model).__name__} cannot go on from them ({said_of(error)})"
            warnings.warn(
                f"prompts are not kept: {reason}. Every step takes them through the model again, with the same result",
                stacklevel=3,
            )
    if answers is None:
        yield collator
        return
    with going_on(handle.model, answers.slots, lambda: handle.acting_on(EVERYWHERE)):
        yield answers


def _checked(base: _Base, sequences, made: dict, gb: float, root: Path, progress: bool) -> AnswerCollator:
    """What makes batches over a store that is filled if need be, and proved on this very model."""
    _check_steady(base)
    prompts = prompts_of(sequences)
    if not prompts:
        raise NotPlain("no prompt has more than one token")
    sample, slots = base.run(prompts[:1])

    def proved(store: PrefixStore) -> AnswerCollator | str:
        answers = AnswerCollator(store=store, slots=slots, pinned=pins(base.device), **made)
        return _disagreement(base, answers, sequences) or answers

    how = {"gb": gb, "computing": lambda rows: _computing(base, rows), "progress": progress}
    return proven(Wanted("prompts", root, _key(base, prompts, sample, slots), prompts, sample, **how), proved)


def _check_steady(base: _Base) -> None:
    """Refuse, from what can be read off the model, a base that changes or is not all there."""
    if reason := length_refusal(base.model):
        raise NotPlain(reason)
    for module in base_modules(base.decoder):
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            raise NotPlain("the base is trained too")
        if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
            raise NotPlain("the model is offloaded")
        if getattr(module, "gradient_checkpointing", False):
            raise NotPlain("gradient checkpointing runs layers without their prompts")
        if reason := dropout_of(module):
            raise NotPlain(reason)


def _disagreement(base: _Base, answers: AnswerCollator, sequences: Sequence[Encoded]) -> str | None:
    """How the results of the shortest and the longest prompt differ with the store; None where they do not."""
    ends = _ends(answers.store, sequences)
    model, device = base.model, base.device
    plain, batch = (on_device(collate(ends), device) for collate in (answers.collator, answers))
    expected, loss = _doubled(model, plain)
    # what is random in training must not move the generators that training draws from
    with (
        torch.random.fork_rng(),
        eval_mode(model),
        going_on(model, answers.slots, lambda: base.handle.acting_on(EVERYWHERE)),
    ):
        model.train()
        got, short_loss = _doubled(model, batch)
    allowed = rounding(model)
    away = max(difference(got, expected), abs(float(short_loss / loss) - 1))
    # written so that NaN is a difference
    return None if away <= allowed else f"with kept prompts the model's results differ by {away:.1e}"


def _ends(store: PrefixStore, sequences: Sequence[Encoded]) -> list[Encoded]:
    """The sequences with the shortest and the longest of the prompts that are in the store."""
    starts = [(found[0], place) for place, row in enumerate(sequences) if (found := span(row)) and found[0]]
    kept = [at for start, at in sorted(starts) if store.find(sequences[at]["input_ids"][:start]) is not None]
    return [sequences[kept[0]], sequences[kept[-1]]]


def _doubled(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits, loss = labelled_logits(model, batch)
    return logits.double(), loss.double()


def _key(base: _Base, prompts: Sequence[Sequence[int]], sample: Tensor, slots: Slots) -> str:
    """32 hex digits over everything that the keys and values depend on: weights, code, settings, tokens."""
    about = {
        "format": _FORMAT,
        "shapes": slots.shapes,
        "dtype": str(sample.dtype),
        "device": sample.device.type,
        "base": identity_of(base.model, base.decoder),
        "data": [digest(row).hex() for row in prompts],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _computing(base: _Base, prompts: Rows) -> Callable[[Rows], Tensor]:
    """What makes a batch of these prompts into keys and values; what they all begin with runs once."""
    shared = common_beginning(prompts)
    beginning = base.run([shared]) if len(shared) >= _LEAST_SHARED and len(prompts) > 1 else None
    return lambda batch: base.run(batch, beginning)[0]
