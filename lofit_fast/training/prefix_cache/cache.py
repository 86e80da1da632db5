"""The prefix cache: layers below the lowest tuned head give the same activations every epoch, so they run once.

The hidden states that enter the lowest tuned layer are computed before training, kept on disk, and emitted by
stand-ins in place of the layers that made them. Filling first, rather than during the first epoch, costs one forward
pass of those layers in length-sorted batches; from then on every epoch of every run on the same model, data and layer
goes without, and all epochs see the very same numbers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from lofit_fast.data.collate import Batch, on_device
from lofit_fast.data.encode import Encoded
from lofit_fast.models.base_digest import INCIDENTAL, weights_of
from lofit_fast.models.trials import labelled_logits
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.modes import eval_mode
from lofit_fast.training.engine.compiled_layers import uncompiled
from lofit_fast.training.engine.device_queue import pins
from lofit_fast.training.prefix_cache.below import STATES, Prefix, check_fit
from lofit_fast.training.prefix_cache.proven_store import Unfit, Wanted, proven
from lofit_fast.training.prefix_cache.store import PrefixStore, digest, root_folder

# what the files mean; another number is another key
_FORMAT = 2

Collator = Callable[[Sequence[Encoded]], Batch]


@dataclass(frozen=True)
class PrefixCollator:
    """A collator's batches, with their cached states (B, S, N) under STATES when every example has them.

    Follows right-padded batches (B, S), packed ones (1, T), whose examples lie end to end, and those of a
    PackedCollator. pinned: lay the states in memory that a device copies from by itself, beside a step.
    Raises ValueError for batches laid out in another way.
    """

    collator: Collator
    store: PrefixStore
    pinned: bool = False

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """The collator's batch, and the states if all rows have them. Positions that hold no token are zero."""
        return self.add(self.collator(rows), rows)

    def add(self, batch: Batch, rows: Sequence[Encoded]) -> Batch:
        """A batch of just these rows, in their order, with the states if all rows have them."""
        found = [self.store.find(row["input_ids"]) for row in rows]
        if any(states is None for states in found):
            return batch
        ids = batch["input_ids"]
        pinned = self.pinned and get_worker_info() is None
        laid = found[0].new_zeros((*ids.shape, found[0].shape[-1]), pin_memory=pinned)
        for row, states, place in zip(rows, found, _places(batch, rows), strict=True):
            tokens = ids[place]
            if tokens.tolist() != list(row["input_ids"][: len(tokens)]):
                raise ValueError("expected batches padded on the right or packed, in the order of the rows")
            laid[place] = states[: len(tokens)]
        return {**batch, STATES: laid}


def _places(batch: Batch, rows: Sequence[Encoded]) -> Iterator[tuple]:
    """Where each row's tokens are in a batch's input_ids, all of them or but the last."""
    lengths = [len(row["input_ids"]) for row in rows]
    if "packed_rows" in batch:
        for index, real in zip(batch["packed_rows"], batch["attention_mask"].bool(), strict=True):
            yield 0, index[real]
    elif len(batch["input_ids"]) == len(rows):
        for i, length in enumerate(lengths):
            yield i, slice(length)
    else:
        ends = accumulate(lengths)
        for end, length in zip(ends, lengths, strict=True):
            yield 0, slice(end - length, end)


@contextmanager
def prefix_cached(
    handle: LofitHandle,
    sequences: Sequence[Encoded],
    collator: Collator,
    *,
    gb: float,
    folder: Path | None = None,
    progress: bool = False,
) -> Iterator[Collator]:
    """A scope in which batches of the given sequences skip the layers below the lowest tuned one.

    Yields the collator to train with: one that adds the cached states, or `collator` itself where nothing is cached.
    Losses and gradients are what they are without, up to rounding (where frozen products are in 8 bits, theirs: states
    are kept in full); batches with other sequences run as ever.
    sequences: all that training and evaluation will see; when they do not all fit, the shortest are kept.
    gb: bound on all stores in `folder` together, in 10^9 bytes; 0 caches nothing. folder: default "prefix" in
    the cache folder of lofit-fast.
    Nothing is cached, and a warning says why, when the lowest layer is tuned, when the layers below are not frozen or
    not the same in every pass (dropout), when the disk does not take it, or when the model's outputs with the cache
    differ from those without.
    """
    if not gb:
        yield collator
        return
    prefix = store = None
    with eval_mode(handle.model), torch.no_grad():
        try:
            prefix = Prefix(handle)
            with uncompiled(prefix.layers):
                store = _checked_store(prefix, sequences, collator, gb, folder or root_folder(), progress)
        # training goes on without it, whatever a model, a batch or a disk may raise
        except Exception as error:
            reason = str(error) if isinstance(error, Unfit | OSError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"prefix cache off: {reason}", stacklevel=3)
    if store is None:
        yield collator
    else:
        with prefix.skipped():
            yield PrefixCollator(collator, store, pinned=pins(prefix.device))


def _checked_store(prefix: Prefix, sequences, collator, gb: float, root: Path, progress: bool) -> PrefixStore:
    """The store to train with, filled if need be, and proved on this very model."""
    check_fit(prefix)
    # in an order of their own: the same data shuffled is the same data
    ids = sorted({tuple(row["input_ids"]) for row in sequences}, key=lambda row: (len(row), row))
    sample = _steady_states(prefix, ids[0])
    how = {"gb": gb, "computing": lambda rows: prefix.run, "progress": progress}
    wanted = Wanted("prefix cache", root, _key(prefix, ids, sample), ids, sample, **how)
    return proven(wanted, lambda store: _disagreement(prefix, store, sequences, collator) or store)


def _steady_states(prefix: Prefix, ids: Sequence[int]) -> Tensor:
    """The states of a sequence, (1, S, N), the same in training as in evaluation; refused where they are not."""
    states = prefix.run([ids])
    if not states.isfinite().all():
        raise Unfit("the hidden states are not finite")
    # what is random in training must not move the generators that training draws from
    with torch.random.fork_rng(), eval_mode(prefix.model):
        prefix.model.train()
        if not prefix.run([ids]).equal(states):
            raise Unfit("the layers below the lowest tuned one compute something else in training mode")
    return states


def _disagreement(prefix: Prefix, store: PrefixStore, sequences: Sequence[Encoded], collator) -> str | None:
    """What the model says otherwise with the store than without, on its shortest and its longest; None if nothing."""
    rows = sorted((row for row in sequences if store.find(row["input_ids"]) is not None), key=_length)
    ends = [rows[0], rows[-1]]
    plain = on_device(collator(ends), prefix.device)
    batch = on_device(PrefixCollator(collator, store)(ends), prefix.device)
    expected = _logits(prefix.model, plain)
    with prefix.skipped():
        got = _logits(prefix.model, batch)
    # half of the digits: rounding that differs with the shape of a batch is far below, a wrong state far above
    error = ((got - expected).norm() / expected.norm()).item()
    agrees = error <= torch.finfo(store.states.dtype).eps ** 0.5
    return None if agrees else f"with the cached states the model's logits differ by {error:.1e} of their norm"


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return labelled_logits(model, batch)[0].float()


def _key(prefix: Prefix, ids: Sequence[Sequence[int]], sample: Tensor) -> str:
    """32 hex digits over everything that the states depend on: weights, code, settings, tokens, layer."""
    config = text_config(prefix.model)
    about = {
        "format": _FORMAT,
        "layer": prefix.until,
        "dtype": str(sample.dtype),
        "device": sample.device.type,
        "versions": [torch.__version__, transformers.__version__],
        "attention": getattr(config, "_attn_implementation", None),
        "config": {name: value for name, value in config.to_dict().items() if name not in INCIDENTAL},
        "layers": [f"{type(layer).__module__}.{layer!r}" for layer in prefix.layers[: prefix.until]],
        "weights": weights_of(prefix.modules()),
        "data": [digest(row).hex() for row in ids],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _length(row: Encoded) -> int:
    return len(row["input_ids"])
