"""The prefix cache: layers below the lowest tuned head give the same activations every epoch, so they run once.

The hidden states that enter the lowest tuned layer are computed before training, kept on disk, and emitted by
stand-ins in place of the layers that made them. Filling first, rather than during the first epoch, costs one forward
pass of those layers in length-sorted batches; from then on every epoch of every run on the same model, data and layer
goes without, and all epochs see the very same numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_fast.data.collate import Batch, on_device
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.data.padding import padded
from lofit_fast.files import writable_folder
from lofit_fast.patching.architectures import decoder_layers, text_config
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.layer import eval_mode
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine.compiled_layers import any_compiled
from lofit_fast.training.prefix_cache.skip_layers import recorded, skipped
from lofit_fast.training.prefix_cache.store import PrefixStore, digest, make_room, size_on_disk
from lofit_kernels.answers import cache_folder

STATES = "prefix_states"
# padded tokens per forward of a fill
FILL_TOKENS = 2048
# bytes of the disk that a fill leaves free
RESERVE = 10**9
# what the files mean; another number is another key
_FORMAT = 1
# differ between equal models
_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures")

Collator = Callable[[Sequence[Encoded]], Batch]


@dataclass(frozen=True)
class PrefixCollator:
    """A collator's batches, with their cached states (B, S, N) under STATES when every example has them.

    Follows right-padded batches (B, S), packed ones (1, T), whose examples lie end to end, and those of a
    PackedCollator. Raises ValueError for batches laid out in another way.
    """

    collator: Collator
    store: PrefixStore

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """The collator's batch, and the states if all rows have them. Positions that hold no token are zero."""
        batch = self.collator(rows)
        found = [self.store.find(row["input_ids"]) for row in rows]
        if any(states is None for states in found):
            return batch
        ids = batch["input_ids"]
        laid = found[0].new_zeros((*ids.shape, found[0].shape[-1]))
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
    Losses and gradients are what they are without, up to rounding; batches with other sequences run as ever.
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
    folder = folder or cache_folder() / "prefix"
    with eval_mode(handle.model), torch.no_grad():
        try:
            prefix = _Prefix(handle)
            with prefix.uncompiled():
                store = _checked_store(prefix, sequences, collator, gb, folder, progress)
        # training goes on without it, whatever a model, a batch or a disk may raise
        except Exception as error:
            reason = str(error) if isinstance(error, _Unfit | OSError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"prefix cache off: {reason}", stacklevel=3)
    if store is None:
        yield collator
    else:
        with prefix.skipped():
            yield PrefixCollator(collator, store)


class _Unfit(Exception):
    """Why nothing is cached."""


class _Prefix:
    """The part of a patched model below its lowest tuned layer."""

    def __init__(self, handle: LofitHandle) -> None:
        self.model = handle.model
        places = {id(layers): path for path, layers in self.model.named_modules()}
        self.layers = _list_of(self.model, decoder_layers(self.model))
        self.decoder = self.model.get_submodule(places[id(self.layers)].rpartition(".")[0])
        self.until = min(handle.layers)
        self.device = device_of(self.model)

    def modules(self) -> Iterator[nn.Module]:
        """Every module of the decoder that the states depend on."""
        above = {id(m) for layer in self.layers[self.until :] for m in layer.modules()}
        return (m for m in self.decoder.modules() if id(m) not in above)

    def run(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """The states (B, S, N) that enter layer `until`, for sequences padded to the longest."""
        ids, mask = (x.to(self.device) for x in padded(batch, 0))
        with recorded(self.layers, self.until) as states:
            self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return states.value

    def skipped(self):
        """A scope in which batches with states skip the prefix."""
        return skipped(self.model, self.layers, self.until, STATES)

    def uncompiled(self):
        """A scope in which compiled layers run eagerly: a graph of their own for a few passes would not pay."""
        return torch.compiler.set_stance("force_eager") if any_compiled(self.layers) else nullcontext()


def _list_of(model: nn.Module, layers: Sequence[nn.Module]) -> nn.ModuleList:
    """The list in the model that holds just these layers. Raises _Unfit where there is none."""
    wanted = list(map(id, layers))
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = next((one for one in lists if list(map(id, one)) == wanted), None)
    if found is None:
        raise _Unfit("the decoder's layers are in no list of their own")
    return found


def _checked_store(prefix: _Prefix, sequences, collator, gb: float, root: Path, progress: bool) -> PrefixStore:
    """The store to train with, filled if need be, and proved on this very model."""
    _check_fit(prefix)
    # in an order of their own: the same data shuffled is the same data
    ids = sorted({tuple(row["input_ids"]) for row in sequences}, key=lambda row: (len(row), row))
    sample = _steady_states(prefix, ids[0])
    folder = writable_folder(root) / _key(prefix, ids, sample)
    allowed = _allowed_bytes(root, gb)
    kept = _that_fit(ids, sample, gb, allowed)
    make_room(root, folder.name, allowed - _bytes(kept, sample))
    store = PrefixStore.open(folder)
    usable = store is not None and len(store) >= len(kept) and store.states.nbytes <= allowed
    # the key cannot see everything, such as what a hook does: what disagrees is made anew, and judged again
    if usable and _disagreement(prefix, store, sequences, collator) is None:
        return store
    PrefixStore.discard(folder)
    PrefixStore.write(folder, _filled(prefix, kept, progress))
    store = PrefixStore.open(folder)
    if store is None:
        raise _Unfit(f"what was written to {folder} cannot be read back")
    try:
        if reason := _disagreement(prefix, store, sequences, collator):
            raise _Unfit(reason)
    except Exception:
        PrefixStore.discard(folder)
        raise
    return store


def _check_fit(prefix: _Prefix) -> None:
    """Refuse, from what can be read off the model, a prefix that is empty or changes."""
    if prefix.until == 0:
        raise _Unfit("layer 0 is tuned, so every layer depends on the adapter (--min-layer keeps the lower ones free)")
    for module in prefix.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            raise _Unfit("the layers below the lowest tuned one are trained too")
        if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
            raise _Unfit("the model is offloaded")
        kind = type(module).__name__
        rate = ("p", "dropout") if "Dropout" in kind else ("dropout",)
        floats = {name: x for name, x in vars(module).items() if isinstance(x, float) and x > 0}
        positive = [f"{name}={x}" for name, x in floats.items() if name.endswith(rate)]
        if positive:
            raise _Unfit(f"{kind} has {positive[0]}, so no two passes are the same")


def _steady_states(prefix: _Prefix, ids: Sequence[int]) -> Tensor:
    """The states of a sequence, (1, S, N), the same in training as in evaluation; refused where they are not."""
    states = prefix.run([ids])
    if not states.isfinite().all():
        raise _Unfit("the hidden states are not finite")
    # what is random in training must not move the generators that training draws from
    with torch.random.fork_rng(), eval_mode(prefix.model):
        prefix.model.train()
        if not prefix.run([ids]).equal(states):
            raise _Unfit("the layers below the lowest tuned one compute something else in training mode")
    return states


def _disagreement(prefix: _Prefix, store: PrefixStore, sequences: Sequence[Encoded], collator) -> str | None:
    """What the model says otherwise with the store than without, on its shortest and its longest; None if nothing."""
    rows = sorted((row for row in sequences if store.find(row["input_ids"]) is not None), key=_length)
    ends = [rows[0], rows[-1]]
    plain = on_device(collator(ends), prefix.device)
    batch = on_device(PrefixCollator(collator, store)(ends), prefix.device)
    expected = _labelled(prefix.model, plain)
    with prefix.skipped():
        got = _labelled(prefix.model, batch)
    # half of the digits: rounding that differs with the shape of a batch is far below, a wrong state far above
    error = ((got - expected).norm() / expected.norm()).item()
    agrees = error <= torch.finfo(store.states.dtype).eps ** 0.5
    return None if agrees else f"with the cached states the model's logits differ by {error:.1e} of their norm"


def _labelled(model: nn.Module, batch: Batch) -> Tensor:
    """(labelled tokens, vocabulary): of the logits that a batch asks for. What stands in padding is anything."""
    logits, following = model(**{**batch, "use_cache": False}).logits, batch.get("shift_labels")
    if following is None:
        logits, following = logits[:, :-1], batch["labels"][:, 1:]
    return logits.flatten(0, -2)[following.flatten().to(logits.device) != IGNORED].float()


def _key(prefix: _Prefix, ids: Sequence[Sequence[int]], sample: Tensor) -> str:
    """32 hex digits over everything that the states depend on: weights, code, settings, tokens, layer."""
    config = text_config(prefix.model)
    about = {
        "format": _FORMAT,
        "layer": prefix.until,
        "dtype": str(sample.dtype),
        "device": sample.device.type,
        "versions": [torch.__version__, transformers.__version__],
        "attention": getattr(config, "_attn_implementation", None),
        "config": {name: value for name, value in config.to_dict().items() if name not in _INCIDENTAL},
        "layers": [f"{type(layer).__module__}.{layer!r}" for layer in prefix.layers[: prefix.until]],
        "weights": _weights_digest(prefix),
        "data": [digest(row).hex() for row in ids],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _weights_digest(prefix: _Prefix) -> list[str]:
    """SHA-256 of every parameter and buffer of the prefix, all of its bytes."""
    modules = list(prefix.modules())
    tensors = [t for m in modules for of in (m.parameters, m.buffers) for t in of(recurse=False)]

    def one(tensor: Tensor) -> str:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.data).hexdigest()}"

    # hashing leaves the interpreter's lock
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return list(pool.map(one, tensors))


def _allowed_bytes(root: Path, gb: float) -> int:
    """What the stores in a folder may take together: the bound, or what the disk has if that is less."""
    on_disk = shutil.disk_usage(root).free - RESERVE + size_on_disk(root)
    return max(0, min(int(gb * 1e9), on_disk))


def _that_fit(ids: list[tuple], sample: Tensor, gb: float, allowed: int) -> list[tuple]:
    """As many sequences as are allowed, the shortest first. Warns when that is not all, refuses when it is none."""
    room = allowed // _bytes([(0,)], sample)
    ends = torch.tensor([len(row) for row in ids]).cumsum(0)
    count = int((ends <= room).sum())
    if count == len(ids):
        return ids
    given = "the bound is" if allowed == int(gb * 1e9) else "the disk has room for"
    short = f"it needs {_bytes(ids, sample) / 1e9:.3g} GB, {given} {allowed / 1e9:.3g} GB"
    if not count:
        raise _Unfit(short)
    message = f"prefix cache: {short}: {count} of {len(ids)} sequences are kept, batches with others run in full"
    warnings.warn(message, stacklevel=5)
    return ids[:count]


def _bytes(ids: Sequence[Sequence[int]], sample: Tensor) -> int:
    return sum(map(len, ids)) * sample.shape[-1] * sample.dtype.itemsize


def _filled(prefix: _Prefix, ids: Sequence[Sequence[int]], progress: bool) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Every sequence with its states, in batches of like length. ids: ascending by length."""
    with tqdm(total=sum(map(len, ids)), desc="prefix cache", unit="tok", disable=not progress, leave=False) as bar:
        start = 0
        while start < len(ids):
            end = start + 1
            while end < len(ids) and (end + 1 - start) * len(ids[end]) <= FILL_TOKENS:
                end += 1
            states = prefix.run(ids[start:end])
            for row, of_row in zip(ids[start:end], states, strict=True):
                yield row, of_row[: len(row)]
                bar.update(len(row))
            start = end


def _length(row: Encoded) -> int:
    return len(row["input_ids"])
