"""The output head's input in one piece: without it, generating with a frozen model on a CPU copies the head per row.

`generate` hands the head the last position of every row, a slice with gaps. `torch.matmul` flattens such an input into
one product if the weight requires a gradient; if it is frozen, it expands the weight to a batch instead, and the CPU's
`bmm` copies what was expanded: 32 rows and a vocabulary of 262144 make it 10 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_head_input_whole(model: nn.Module) -> RemovableHandle | None:
    """Give the model's output head contiguous inputs until the hook is removed; None for a model without a head."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return None if head is None else head.register_forward_pre_hook(_contiguous)


@contextmanager
def whole_head_input(model: nn.Module) -> Iterator[None]:
    """A scope of `keep_head_input_whole`."""
    hook = keep_head_input_whole(model)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def is_ours(hook: object) -> bool:
    """Whether a hook is what `keep_head_input_whole` puts on a head: it changes no number."""
    return hook is _contiguous


def _contiguous(head: nn.Module, args: tuple) -> tuple:
    return (args[0].contiguous(), *args[1:]) if args else args
