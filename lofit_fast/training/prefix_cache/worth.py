"""Whether a prefix cache pays, by a count: operations it saves against operations it takes and bytes it moves.

No clock is asked. The same model, data and epochs give the same answer wherever the disk has the room.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.patching.architectures import decoder_layers, text_config
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.prefix_cache.below import Prefix, check_fit
from lofit_fast.training.prefix_cache.proven_store import Unfit
from lofit_fast.training.prefix_cache.store import RESERVE, digest, root_folder, size_on_disk

# share of the disk's room, stores that are there included, that "auto" takes
SHARE = 0.1
# share of a training's operations that a cache must save
LEAST_SAVED = 0.05
# operations that a byte written, read or hashed counts as. rough on purpose, and high: a disk of 1 GB/s beside a few
# cores of 100 GFLOP/s, or beside a GPU of 20 TFLOP/s in practice
_PER_BYTE = {"cpu": 100}
_PER_BYTE_ELSEWHERE = 20_000


@dataclass(frozen=True)
class Worth:
    """What a prefix cache would save in one training.

    layers: below the lowest tuned one. tokens: of all different sequences, each kept once. passes: how often each goes
    through the model on average. bytes: on disk. room: bytes that "auto" may take. saved: share of the training's
    operations that it saves, fill and moved bytes paid for; negative where it costs more. refusal: why "auto" keeps
    nothing, or None where it does.
    """

    layers: int
    tokens: int
    passes: float
    bytes: int
    room: int
    saved: float
    refusal: str | None

    @property
    def gb(self) -> float:
        """What "auto" stands for, in 10^9 bytes: the room, or 0."""
        return 0.0 if self.refusal else round(self.room / 1e9, 3)


def settled_prefix(attachment: Attachment, engine: Engine, sequences: Sequence[Encoded], read: int) -> Engine:
    """The engine with a number for prefix_cache_gb. sequences, read: as in `worth_of`."""
    if engine.prefix_cache_gb != "auto":
        return engine
    return replace(engine, prefix_cache_gb=worth_of(attachment, sequences, read).gb)


def worth_of(attachment: Attachment, sequences: Sequence[Encoded], read: int, root: Path | None = None) -> Worth:
    """What a prefix cache of the sequences would save.

    Args:
        attachment: in its model.
        sequences: all that training and evaluation see.
        read: tokens that go through the model in all passes over them, without a cache.
        root: the folder of stores; None means the usual one.

    The count. W weights take 2 W operations per token forward, and 2 W more for the input gradient, which stops at the
    lowest tuned layer. Without a cache `read` tokens pass the layers below; with one each different sequence does
    once. Against that: the bytes written once, hashed then and when the store is opened, and read in every pass, and
    the weights below, all of which are hashed.
    """
    unique = {digest(row["input_ids"]): len(row["input_ids"]) for row in sequences}
    tokens, model = sum(unique.values()), attachment.model
    room, nowhere = 0, None
    try:
        root = root or root_folder()
        room = int(SHARE * max(0, _free(root) + size_on_disk(root) - RESERVE))
    except FileNotFoundError as error:
        nowhere = str(error)
    passes = read / tokens if tokens else 0.0
    below, refusal = 0, f"only LoFiT's vectors leave the layers below alone, not a {type(attachment).__name__}"
    if isinstance(attachment, LofitHandle):
        below, refusal = min(attachment.layers), _unfit(attachment) or nowhere
    size = tokens * text_config(model).hidden_size * dtype_of(model).itemsize
    saved = 0.0 if refusal else _saved(model, below, tokens, read, size, _labels(sequences) * passes)
    if not refusal and saved < LEAST_SAVED:
        refusal = f"it would save {saved:.0%} of the operations, expected {LEAST_SAVED:.0%} at least"
    if not refusal and size > room:
        refusal = f"it needs {size / 1e9:.3g} GB, and a tenth of the disk's room is {room / 1e9:.3g} GB"
    return Worth(below, tokens, passes, size, room, saved, refusal)


def _saved(model: nn.Module, below: int, tokens: int, read: int, size: int, labels: float) -> float:
    """The share of a training's operations that is saved. labels: labelled tokens of all passes."""
    layers = decoder_layers(model)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    under, over = sum(weights[:below]), sum(weights[below:])
    config = text_config(model)
    whole = read * (2 * under + 4 * over) + 4 * labels * config.vocab_size * config.hidden_size
    hashed = sum(p.numel() * p.element_size() for layer in layers[:below] for p in layer.parameters())
    moved = hashed + 3 * size + (size * read // tokens if tokens else 0)
    per_byte = _PER_BYTE.get(device_of(model).type, _PER_BYTE_ELSEWHERE)
    return (2 * under * (read - tokens) - per_byte * moved) / max(1, whole)


def _unfit(handle: LofitHandle) -> str | None:
    """Why the layers below cannot be kept, as far as the model says without a pass."""
    try:
        check_fit(Prefix(handle))
    except Unfit as reason:
        return str(reason)
    return None


def _labels(sequences: Sequence[Encoded]) -> int:
    return sum(label != IGNORED for row in sequences for label in row["labels"])


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
