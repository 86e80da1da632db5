"""Logits of chosen tokens alone, whatever a model's forward takes: its output head is given those tokens' rows.

`logits_to_keep` as a mask is news to transformers (5.21), and a mask on an accelerator makes the host wait until it has
been counted. An index made on the host does neither: a hook in front of the head reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lofit_fast.data.collate import KEPT_ROWS


@contextmanager
def selecting_rows(model: nn.Module) -> Iterator[None]:
    """A scope in which a batch with KEPT_ROWS gets logits (rows, vocabulary) of those tokens, and of no others.

    model: what is called with the batches, a Hugging Face model or PEFT's wrapper of one. KEPT_ROWS: (rows,) int64,
    places in the flattened (B, S) tokens; the model itself never sees it. A batch without it runs as always. Gradients
    are those of the same rows of all logits. What is added is hooks, and all of them go.
    `logit_rows.logit_rows` tries whether a model is one that this works for. One without an output head is left alone,
    and takes no such batch.
    """
    head = output_head(model)
    rows = _Rows(model)
    hooks = [] if head is None else rows.on(head)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def output_head(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states, or None where a model has no such module or leaves it open."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        return None if find is None else find()
    # a class that leaves it open says so by an error
    except NotImplementedError:
        return None


def n_tokens(args: tuple, kwargs: dict) -> int:
    """How many tokens a model is called with, padding included; 0 where that cannot be seen."""
    ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    ids = args[0] if ids is None and args else ids
    if isinstance(ids, Tensor):
        return ids.numel()
    return embedded.shape[:-1].numel() if isinstance(embedded, Tensor) else 0


class _Rows(threading.local):
    """The rows that are wanted of the forward pass that goes on in a thread. index: (rows,) int64, or None for all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.index: Tensor | None = None
        self.tokens = 0

    def on(self, head: nn.Module) -> list:
        return [
            self.model.register_forward_pre_hook(self.take, with_kwargs=True),
            self.model.register_forward_hook(self.drop, always_call=True),
            head.register_forward_pre_hook(self.select),
        ]

    def take(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # a keyboard's interrupt runs no hooks: what it has ended is still there
        self.index = None
        if KEPT_ROWS not in kwargs:
            return None
        self.index, self.tokens = kwargs[KEPT_ROWS], n_tokens(args, kwargs)
        return args, {name: value for name, value in kwargs.items() if name != KEPT_ROWS}

    def drop(self, module: nn.Module, args: tuple, output: object) -> None:
        self.index = None

    def select(self, head: nn.Module, args: tuple) -> tuple | None:
        if self.index is None:
            return None
        hidden = args[0]
        if hidden.shape[:-1].numel() != self.tokens:
            raise ValueError(f"expected hidden states of {self.tokens} tokens at the head, got {tuple(hidden.shape)}")
        return (hidden.flatten(0, -2).index_select(0, self.index.to(hidden.device)), *args[1:])
