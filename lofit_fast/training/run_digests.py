"""SHA-256 of what a run is made from: its data, and the projections that it trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.data.encode import Encoded
from lofit_fast.patching.fully_sharded import is_spread, whole
from lofit_fast.patching.placement import is_dense, plain_attributes


def data_digest(examples: Iterable[Encoded], beside: Iterable[object] = ()) -> str:
    """SHA-256 over the token ids and labels of a data set. beside: plain data that goes with it."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(_content(example))
    for more in beside:
        digest.update(json.dumps(more).encode())
    return digest.hexdigest()


def groups_digest(groups: Iterable[Sequence[Encoded]]) -> str:
    """SHA-256 over a data set of several sequences each: the same ones in other groups are other data."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(f"{len(group)} ".encode())
        for example in group:
            digest.update(_content(example))
    return digest.hexdigest()


def _content(example: Encoded) -> bytes:
    return json.dumps([example["input_ids"], example["labels"]]).encode()


def weights_digest(projections: Iterable[nn.Module]) -> str:
    """SHA-256 over the first row of every projection's weight: tells models of one shape apart, in no time.

    Of a projection without a dense weight (quantized, offloaded) everything that it holds is taken instead. One that
    FSDP2 shards is gathered: all processes must call it.
    """
    digest = hashlib.sha256()
    for projection in projections:
        weight = getattr(projection, "weight", None)
        weight = whole(weight) if is_spread(weight) else weight
        if is_dense(weight) and weight.dim() == 2 and weight.device.type != "meta":
            digest.update(weight[:1].detach().double().cpu().numpy().tobytes())
        else:
            held = projection.state_dict() | plain_attributes(projection)
            for name, value in sorted(held.items()):
                for part in _parts(name, value):
                    digest.update(part)
    return digest.hexdigest()


def _parts(name: str, value: object) -> Iterator[bytes]:
    """A stored value as bytes, whatever kind of tensor it is: its name, its shape and its numbers."""
    if not isinstance(value, Tensor):
        yield f"{name} {value!r}".encode()
    elif hasattr(value, "_local_tensor"):
        yield from _parts(name, value._local_tensor)
    elif hasattr(value, "__tensor_flatten__"):
        inner, _ = value.__tensor_flatten__()
        for attribute in inner:
            yield from _parts(f"{name}.{attribute}", getattr(value, attribute))
    else:
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        # what is offloaded has no numbers here
        if value.device.type != "meta" and value.layout == torch.strided and not value.is_quantized:
            plain = value.detach().cpu().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
