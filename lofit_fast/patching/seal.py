"""Two digests in an adapter's config: of its tensors, and of the entries that say what these are.

A flipped bit in either file is noticed. Both follow from what an adapter is, whoever writes it and however its tensors
are named: by `handle.save` or by PEFT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

TENSOR_DIGEST, CONFIG_DIGEST = "tensor_digest", "config_digest"
# the entries that the second digest is of; a name of a base model may be changed by hand
SEALED = ("fingerprint", "base_digest", "scale", "offset", "init_std", "seed", "positions", TENSOR_DIGEST)
# what a folder of an earlier release means by leaving an entry out
_ABSENT = {"positions": "all"}


def tensors_digest(tensors: Mapping[tuple[str, int], Tensor]) -> str:
    """SHA-256 over places, dtypes, shapes and bytes of tensors by (component, layer), in whatever order they come."""
    total = hashlib.sha256()
    for component, layer in sorted(tensors):
        # a copy: numpy takes hold of a tensor's memory, which FSDP could not free then
        tensor = tensors[component, layer].detach().cpu().contiguous().clone()
        total.update(f"{component} {layer} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sealed(description: Mapping[str, object], digest: str) -> dict[str, object]:
    """The description of an adapter with the two digests in it. digest: of its tensors."""
    whole = {**description, TENSOR_DIGEST: digest}
    return {**whole, CONFIG_DIGEST: _entries_digest(whole)}


def is_sealed(description: object) -> bool:
    """Whether something read from a file is a description with digests, rightly or not."""
    digests = (TENSOR_DIGEST, CONFIG_DIGEST)
    return isinstance(description, Mapping) and any(description.get(name) is not None for name in digests)


def is_unchanged(description: Mapping[str, object]) -> bool:
    """Whether a description with digests is as it was sealed."""
    return description.get(CONFIG_DIGEST) == _entries_digest(description)


def _entries_digest(description: Mapping[str, object]) -> str:
    entries = [description.get(name, _ABSENT.get(name)) for name in SEALED]
    # as JSON gives it back: tuples are lists
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
